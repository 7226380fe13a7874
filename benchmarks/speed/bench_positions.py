"""Every position of a causal model against ordinary backward passes of its training loss.

    python -m benchmarks.speed.bench_positions

The unit is `--probes` ordinary backward passes through the loss over all positions: the forward
pass once, the graph kept. Ours is `diag_fisher(positions="all", sampler="sketch")` with as many
probes, alternated with them in one process. Refuses to start unless ours at all positions of a
small model equals autograd at each of them.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import fisherkern as fk
from benchmarks.common import append, check_columns, device
from benchmarks.speed.bench_libraries import CLOCKS, paired

COLUMNS = """model sequences T V D probes clock unit_ms p20_ms p50_ms p80_ms ratio ratio_low
    ratio_high""".split()
WIDTH, LAYERS = 64, 2


class Causal(nn.Module):
    """A causal transformer with tied logits at every position."""

    def __init__(self, items: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        block = nn.TransformerEncoderLayer(
            width, 2, width, 0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.items.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.items(ids) + self.positions[: ids.shape[1]]
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        return self.norm(self.blocks(x, mask=mask)) @ self.items.weight.T


def check() -> None:
    """Raise SystemExit unless every position's Fisher is autograd's."""
    torch.manual_seed(0)
    model, ids = Causal(9, 4, 4, 1).double().eval(), torch.randint(1, 9, (3, 4))
    named = dict(model.named_parameters())
    right = {name: torch.zeros_like(p) for name, p in named.items()}
    log_p = model(ids).log_softmax(2).flatten(0, 1)
    for row in log_p:
        for value in row:
            found = torch.autograd.grad(value, list(named.values()), retain_graph=True)
            for name, g in zip(named, found, strict=True):
                right[name] += value.detach().exp() * g.square() / len(log_p)
    ours = fk.diag_fisher(model, [ids], sampler="exact", positions="all", progress=False)
    largest = max(float(f.max()) for f in right.values())
    error = max(float((ours[name] - f).abs().max()) for name, f in right.items()) / largest
    if not error < 1e-9:
        raise SystemExit(f"bench_positions: ours is off by {error:.1e}; stopped")


def models(options: argparse.Namespace) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {
        "transformer": Causal(options.items, options.length, WIDTH, LAYERS)
    }
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return found
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": options.length}
    return {**found, "GPT-2": GPT2LMHeadModel(GPT2Config(vocab_size=options.items, **sizes))}


def measure(name: str, model: nn.Module, options: argparse.Namespace) -> None:
    model = model.to(device()).eval()
    generator = torch.Generator().manual_seed(0)
    shape = options.sequences, options.length
    ids = torch.randint(1, options.items, shape, generator=generator).to(device())
    targets, parameters = ids.roll(-1, 1).flatten(), list(model.parameters())

    def ordinary() -> None:
        z = model(input_ids=ids).logits if name == "GPT-2" else model(ids)
        loss = nn.functional.cross_entropy(z.flatten(0, 1), targets)
        for _ in range(options.probes):
            torch.autograd.grad(loss, parameters, retain_graph=True)

    def ours() -> None:
        batch = {"input_ids": ids} if name == "GPT-2" else ids
        settings = {"sampler": "sketch", "probes": options.probes, "positions": "all"}
        fk.diag_fisher(model, [batch], progress=False, **settings)

    found = paired(ordinary, ours, options.repeats, options.clock)
    row = {"model": name, "sequences": options.sequences, "T": options.length}
    row |= {"V": options.items, "D": WIDTH, "probes": options.probes, "clock": options.clock}
    append("positions", [{**row, **found}])
    low, high = found["ratio_low"], found["ratio_high"]
    print(f"{name}: {found['ratio']:.2f} ({low:.2f} to {high:.2f})")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--items", type=int, default=3706)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    check_columns("positions", COLUMNS)
    check()
    torch.manual_seed(0)
    for name, model in models(options).items():
        measure(name, model, options)


if __name__ == "__main__":
    main()
