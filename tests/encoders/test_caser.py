"""Caser against the paper's equations written out window by window."""

from __future__ import annotations

import pytest
import torch
from models import shaken
from torch import Tensor

from fisherkern.encoders import Caser
from fisherkern.errors import InputError

V, MAX_LEN, D = 11, 7, 6
TOKENS = torch.tensor(
    [[0, 0, 0, 0, 7], [1, 2, 3, 4, 5], [0, 6, 6, 6, 2], [0, 0, 0, 0, 0], [3, 0, 0, 9, 3]]
)


def make(**changes: object) -> Caser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"window": 3, "horizontal": 4, "vertical": 2, **changes}
        model = shaken(Caser(V, MAX_LEN, D, **settings))
    with torch.no_grad():
        model.item_embedding.weight[0] = 0
    return model


def of_window(model: Caser, items: list[int]) -> Tensor:
    """h (D,) of one window of L item ids, equations 4 to 10 without the user."""
    length = len(items)
    e = [model.item_embedding.weight[v] for v in items]
    vertical, horizontal = [], []
    for k in range(model.config["vertical"]):
        g = model.vertical.weight[k]
        vertical.append(sum(g[row] * e[row] for row in range(length)))  # (D,), equation 7
    for height in range(1, length + 1):
        layer = model.horizontal[height - 1]
        for k in range(model.config["horizontal"]):
            f = layer.weight[k].view(height, D)
            results = []
            for i in range(length - height + 1):  # equation 4
                product = sum(sum(f[j] * e[i + j]) for j in range(height)) + layer.bias[k]
                results.append(max(float(product), 0.0))
            horizontal.append(max(results))  # equation 6
    together = torch.cat([*vertical, torch.tensor(horizontal, dtype=torch.float64)])
    z = model.dense.weight @ together + model.dense.bias  # equation 9
    return torch.where(z > 0, z, 0.0)


def written_out(model: Caser, tokens: Tensor) -> Tensor:
    """h (T, D) of the windows that end at each column of one sequence."""
    length = model.config["window"]
    padded = [0] * (length - 1) + tokens.tolist()
    return torch.stack([of_window(model, padded[t : t + length]) for t in range(len(tokens))])


@pytest.mark.parametrize(
    "changes", [{}, {"window": 1}, {"window": 5, "tied": True, "bias": False}, {"window": 9}]
)
def test_states_and_logits_are_the_papers(changes: dict[str, object]) -> None:
    model = make(**changes)
    with torch.no_grad():
        expected = torch.stack([written_out(model, tokens) for tokens in TOKENS])
        assert (expected > 0).any(dim=2).all()
        assert (model.states(TOKENS) - expected).abs().max() < 1e-12
        assert (model.encode(TOKENS) - expected[:, -1]).abs().max() < 1e-12
        weight = model.item_embedding.weight[1:] if "tied" in changes else model.output_embedding
        bias = 0 if "bias" in changes else model.output_bias
        assert (model(TOKENS) - (expected[:, -1] @ weight.T + bias)).abs().max() < 1e-12


def test_encode_computes_one_window() -> None:
    model = make()
    shapes = []
    for layer in (*model.horizontal, model.vertical, model.dense):
        layer.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape[1]))
    model.encode(TOKENS)
    # The vertical filters' windows, then those of heights 1, 2 and 3, then h.
    assert shapes[:4] == [1, 3, 2, 1]
    assert len(shapes) == 5


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = Caser(1000, dim=64)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = {
        "item_embedding.weight": (1001, 64),
        "vertical.weight": (4, 5),
        "dense.weight": (64, 4 * 64 + 5 * 16),
        "dense.bias": (64,),
        "output_embedding": (1000, 64),
        "output_bias": (1000,),
    }
    for height in range(1, 6):
        expected[f"horizontal.{height - 1}.weight"] = (16, height * 64)
        expected[f"horizontal.{height - 1}.bias"] = (16,)
    assert shapes == expected
    for table in (model.item_embedding.weight, model.output_embedding):
        assert table.std().item() == pytest.approx(0.88 * 0.02, rel=0.05)
    for layer in (*model.horizontal, model.dense):
        assert layer.weight.var().item() == pytest.approx(2 / sum(layer.weight.shape), rel=0.15)
        assert not layer.bias.any()
    assert not model.item_embedding.weight[0].any() and not model.output_bias.any()


@pytest.mark.parametrize("name", ["window", "horizontal", "vertical"])
def test_wrong_arguments_are_named(name: str) -> None:
    with pytest.raises(InputError, match=f"^Caser: {name} must be at least 1, got 0"):
        make(**{name: 0})
