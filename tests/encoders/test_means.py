"""FISM and YouTube DNN against their equations, item by item; BPR's loss on FISM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import HISTORIES, NUM_ITEMS, shaken
from torch import Tensor

import fisherkern as fk

TOKENS = torch.cat([HISTORIES, torch.tensor([[0, 0, 0, 0, 0], [3, 0, 0, 9, 3]])])


def make(kind: type, **changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = shaken(kind(NUM_ITEMS, 5, 4, **changes))
    with torch.no_grad():
        model.item_embedding.weight[0] = 0
    return model


def state(model: Any, items: list[int], alpha: float) -> Tensor:
    """h of the items of a history."""
    x = sum((model.item_embedding.weight[v] for v in items), torch.zeros(4).double())
    x = x / max(1, len(items)) ** alpha
    for layer in getattr(model, "layers", ()):
        z = [sum(a * b for a, b in zip(row, x, strict=True)) for row in layer.weight]
        x = torch.stack([max(0 * own, own + b) for own, b in zip(z, layer.bias, strict=True)])
    return x


@pytest.mark.parametrize(
    "kind, changes",
    [
        (fk.FISM, {}),
        (fk.FISM, {"alpha": 0.3, "tied": True, "bias": False}),
        (fk.FISM, {"alpha": 0}),
        (fk.YouTubeDNN, {"layers": 1}),
        (fk.YouTubeDNN, {"layers": 3, "hidden_dim": 5, "tied": True}),
    ],
)
def test_states_and_logits_are_the_papers(kind: type, changes: dict[str, Any]) -> None:
    model = make(kind, **changes)
    with torch.no_grad():
        for row, tokens in enumerate(TOKENS):
            for t in range(5):
                items = [v for v in tokens[: t + 1].tolist() if v]
                expected = state(model, items, changes.get("alpha", 1.0))
                assert (model.states(TOKENS)[row, t] - expected).abs().max() < 1e-12
            weight, bias = model.head()
            logits = weight @ expected + (0 if bias is None else bias)
            assert (model(TOKENS)[row] - logits).abs().max() < 1e-12


def test_hidden_layers_have_their_own_width() -> None:
    assert [tuple(own.weight.shape) for own in make(fk.YouTubeDNN).layers] == [(8, 4), (4, 8)]
    with pytest.raises(fk.InputError, match="YouTubeDNN: layers must be at least 1, got 0"):
        fk.YouTubeDNN(5, layers=0)
    with pytest.raises(fk.InputError, match=r"FISM: alpha must be in \[0, 1\], got 2"):
        fk.FISM(5, alpha=2)


@pytest.mark.parametrize("kind", [fk.FISM, fk.YouTubeDNN])
def test_all_positions_have_a_fisher(kind: type) -> None:
    model = make(kind)
    every = fk.diag_fisher(model, [HISTORIES], sampler="exact", positions="all", progress=False)
    total = {name: torch.zeros_like(value) for name, value in every.items()}
    prefixes = [row[None, : t + 1] for row in HISTORIES for t in range(5) if row[t]]
    for prefix in prefixes:
        own = fk.diag_fisher(model, [prefix], sampler="exact", progress=False)
        for name, value in own.items():
            total[name] += value / len(prefixes)
    assert all(torch.allclose(every[name], value, rtol=1e-9) for name, value in total.items())


def test_bpr_trains_fism_above_chance() -> None:
    data = fk.synthetic(num_users=200, num_items=40, seed=0, clusters=4, tastes=2, order=0.0)
    torch.manual_seed(0)
    model = fk.FISM(data.num_items, max_len=20, dim=16)
    before = fk.evaluate(model, data, seen="keep")["ndcg@10"]
    objective = fk.NextItem("bpr", 1)
    fk.train(model, data, objective=objective, epochs=20, batch_size=32, lr=1e-2, progress=False)
    assert fk.evaluate(model, data, seen="keep")["ndcg@10"] > before + 0.05


@pytest.mark.parametrize("kind", [fk.FISM, fk.YouTubeDNN])
def test_training_goes_on_to_the_same_bits(kind: type, tmp_path: Path) -> None:
    data = fk.synthetic(num_users=30, num_items=20, seed=0, clusters=4, tastes=2)

    def run(state: Path | None, stop: int | None = None) -> dict[str, Tensor]:
        def interrupt(epoch: int, *_: object) -> None:
            if epoch == stop:
                raise KeyboardInterrupt

        torch.manual_seed(0)
        model = kind(data.num_items, max_len=10, dim=8)
        settings = {"objective": fk.NextItem("bpr", 1), "state": state, "on_epoch": interrupt}
        fk.train(model, data, epochs=4, batch_size=8, progress=False, **settings)
        return model.state_dict()

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s.safetensors", stop=3)
    again = run(tmp_path / "s.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
