"""A soft prompt per market in front of a frozen network: python examples/market_prompts.py

Two markets sell the same items to users of other habits. A base has seen a little of both. Each
market then trains all of the base, or a prompt alone, a tenth as many numbers: a few rows before
the sequence, which several low-rank projections mix by a gate, and a low-rank matrix that is added
to the items' embeddings by position (after EPT, arXiv 2405.11464, and DePT). Prompts of two markets
merge as any members do; their Fishers are compared with brute force here.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.encoders.transformer import position_ids

SIZES = {"max_len": 20, "dim": 32, "layers": 2, "dropout": 0.1}
PROMPT = {"rows": 2, "rank": 8, "spaces": 2}


class PromptedSASRec(fk.SASRec):
    """A frozen SASRec that reads prompt rows Σ_k g_k(p) ∘ p U_k V_k before x + A B."""

    def __init__(self, *sizes: Any, rows: int, rank: int, spaces: int, **named: Any) -> None:
        super().__init__(*sizes, **named)
        self.requires_grad_(False)
        self.config |= {"rows": rows, "rank": rank, "spaces": spaces}
        self.short = nn.Parameter(torch.randn(rows, self.dim))
        self.down = nn.Parameter(torch.randn(spaces, self.dim, rank) / self.dim**0.5)
        self.up = nn.Parameter(torch.randn(spaces, rank, self.dim) / rank**0.5)
        self.gate = nn.Parameter(torch.zeros(spaces, self.dim))
        self.left = nn.Parameter(torch.randn(self.max_len, rank) / rank**0.5)
        self.right = nn.Parameter(torch.zeros(rank, self.dim))  # x as it is, to begin with

    def prompt(self) -> Tensor:
        """The rows, (rows, D)."""
        spaces = self.short @ self.down @ self.up  # (spaces, rows, D)
        gates = (self.short @ self.gate.t()).softmax(dim=1)
        return (gates.t().unsqueeze(2) * spaces).sum(dim=0)

    def states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        places = position_ids(tokens, self.max_len)
        x = self.scale * self.item_embedding(tokens) + self.position_embedding(places)
        x = x + (self.left @ self.right)[places]
        rows = self.prompt()
        x = torch.cat([rows.expand(len(tokens), -1, -1), self.dropout(x)], dim=1)
        # Everybody sees the rows; padding, and what is later, nobody but itself.
        column = torch.arange(x.shape[1], device=tokens.device)
        there = torch.cat([tokens.new_ones(len(tokens), len(rows)), tokens], dim=1) != 0
        later = (column > column[:, None]) & (column >= len(rows))
        hidden = (later | ~there[:, None] & (column != column[:, None])).unsqueeze(1)
        for block in self.blocks:
            x = block(x, hidden)
        states = self.final_norm(x[:, len(rows) :])
        return (
            states
            if positions is None
            else states.gather(1, positions.unsqueeze(2).expand(-1, -1, self.dim))
        )


def prompted(base: fk.SASRec) -> PromptedSASRec:
    """The base behind a new prompt, the same for every market."""
    torch.manual_seed(1)
    model = PromptedSASRec(base.num_items, **SIZES, **PROMPT)
    model.load_state_dict(base.state_dict(), strict=False)
    model.item_ids = base.item_ids
    return model


def trained(model: fk.SASRec, data: fk.SequenceDataset, epochs: int, lr: float) -> fk.SASRec:
    settings = {"batch_size": 32, "schedule": "linear", "progress": False}
    fk.train(model, data, objective=fk.NextItem(), epochs=epochs, lr=lr, **settings)
    return model


def brute_force(model: fk.SASRec, history: Tensor) -> dict[str, Tensor]:
    """The mean over sequences of Σ_y p(y) (∂ log p(y) / ∂θ)², a backward pass for each y."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in history:
        logs = model({"history": row[None]})[0].log_softmax(dim=0)
        for log in logs:
            gradients = torch.autograd.grad(log, list(parameters.values()), retain_graph=True)
            for total, gradient in zip(fisher.values(), gradients, strict=True):
                total += log.detach().exp() * gradient.square() / len(history)
    return fisher


markets = {
    name: fk.synthetic(num_users=300, num_items=120, clusters=12, seed=seed)
    for seed, name in enumerate(("north", "south"))
}
first = markets["north"]
both = fk.SequenceDataset(
    "both",
    np.concatenate([data.items for data in markets.values()]),
    np.concatenate([first.offsets, first.offsets[-1] + markets["south"].offsets[1:]]),
    first.item_ids,
    [f"{name} {user}" for name, data in markets.items() for user in data.user_ids],
)
torch.manual_seed(0)
base = trained(fk.SASRec(first.num_items, **SIZES), both, epochs=15, lr=3e-3)

models: dict[str, list[fk.SASRec]] = {
    "fine-tuned": [trained(copy.deepcopy(base), data, 10, 1e-3) for data in markets.values()],
    "prompt": [trained(prompted(base), data, 10, 1e-2) for data in markets.values()],
}
for kind, members in list(models.items()):
    fishers = []
    for model, data in zip(members, markets.values(), strict=True):
        loader = data.loader(split="train", max_len=20)
        fishers.append(fk.diag_fisher(model, loader, sampler="exact", progress=False))
    models[f"{kind}, merged"] = [fk.merge(members, fishers=fishers)] * 2

# Of the prompt alone, and right.
double = copy.deepcopy(models["prompt"][0]).double()
history = next(iter(first.loader(split="train", max_len=20, batch_size=3)))["history"]
exact = brute_force(double, history)
fisher = fk.diag_fisher(double, [{"history": history}], sampler="exact", progress=False)
assert set(fisher) == set(exact) == {"short", "down", "up", "gate", "left", "right"}
for name, expected in exact.items():
    assert (fisher[name] - expected).abs().max() < 1e-10 * expected.max(), name

numbers = {
    kind: sum(p.numel() for p in models[kind][0].parameters() if p.requires_grad)
    for kind in ("fine-tuned", "prompt")
}
print(
    f"numbers trained: {numbers['fine-tuned']:,} by fine-tuning, {numbers['prompt']:,} in a prompt"
)
print("NDCG@10, and the difference from the base with its 95 % interval, of each market's users:")
for number, (market, data) in enumerate(markets.items()):
    before = fk.evaluate(base, data)
    print(f"{market:<8}{'base':<20}{before['ndcg@10']:.4f}")
    for kind, members in models.items():
        report = fk.evaluate(members[number], data)
        d = fk.compare(report, before)["ndcg@10"]
        interval = f"{d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
        print(f"{'':<8}{kind:<20}{report['ndcg@10']:.4f} {interval}")
