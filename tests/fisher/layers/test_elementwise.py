"""Gains, norms, sums and lookups in the forms that recommenders use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import SIZES, Recommender, assert_right
from models import HISTORIES, shaken
from torch import Tensor, nn

import fisherkern as fk

Body = Callable[[nn.ParameterDict, Tensor], Tensor]


class Bare(nn.Module):
    """A body written as a function of bare parameters."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], body: Body) -> None:
        super().__init__()
        self.parameter = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        )
        self.function = body

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        return self.function(self.parameter, x)


def in_place(p: nn.ParameterDict, x: Tensor) -> Tensor:
    x = x * 1
    x += p["t"]
    return torch.tanh(x).sum(1)


def time_first(p: nn.ParameterDict, x: Tensor) -> Tensor:
    x = torch.tanh(x.transpose(0, 1) + p["t"][: x.shape[1]])
    return (F.layer_norm(x, (4,), p["g"], p["b"]) @ p["w"]).sum(0)


def flat(p: nn.ParameterDict, x: Tensor, time_first: bool) -> Tensor:
    """Layers on (N·T, D), or on (T·N, D), one after the other."""
    x = torch.tanh(x.transpose(0, 1) if time_first else x)
    rows = F.layer_norm(x.reshape(-1, 4), (4,), p["g"])
    rows = torch.addmm(p["b"], F.relu(F.linear(rows, p["in"])), p["out"]) * p["g"]
    return rows.view(x.shape).sum(0 if time_first else 1)


FLAT = {"g": (4,), "in": (6, 4), "b": (4,), "out": (6, 4)}


def overwritten(p: nn.ParameterDict, x: Tensor) -> Tensor:
    y = F.linear(x, p["w"], p["b"])
    y[:, 0] = 0
    return y.relu_().sum(1)


BODIES: dict[str, tuple[dict[str, tuple[int, ...]], Body]] = {
    "gain": ({"g": (4,)}, lambda p, x: (torch.tanh(x) * p["g"]).sum(1)),
    "gain on the left": ({"g": (4,)}, lambda p, x: torch.mul(p["g"], torch.tanh(x)).sum(1)),
    "gain of every position": ({"g": (5, 1)}, lambda p, x: (x * p["g"]).sum(1)),
    "scalar gain": ({"g": ()}, lambda p, x: (x * p["g"]).sum(1)),
    "gain of a constant": ({"g": (4,)}, lambda p, x: x.sum(1) + p["g"] * torch.ones(len(x), 1)),
    "gain, then position": (
        {"g": (1, 1, 4), "t": (5, 4)},
        lambda p, x: torch.tanh(x * p["g"] + p["t"]).sum(1),
    ),
    "sum in place": ({"t": (5, 4)}, in_place),
    "time first": ({"t": (7, 1, 4), "g": (4,), "b": (4,), "w": (4, 4)}, time_first),
    "output overwritten": ({"w": (4, 4), "b": (4,)}, overwritten),
    "flattened": (FLAT, lambda p, x: flat(p, x, False)),
    "flattened, time first": (FLAT, lambda p, x: flat(p, x, True)),
    "addmm": (
        {"b": (4,), "w": (4, 4)},
        lambda p, x: torch.addmm(p["b"], torch.tanh(x.sum(1)), p["w"]),
    ),
    "product with a transpose": (
        {"w": (4, 4)},
        lambda p, x: torch.matmul(torch.tanh(x), p["w"].transpose(0, 1)).sum(1),
    ),
    "rows by index": (
        {"e": (3, 4)},
        lambda p, x: (x * torch.tanh(p["e"][(x[:, :, 0] > 0).long() - 1])).sum(1),
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_bare_parameters(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(Bare(*BODIES[name])), caplog)


FLATTENED = ["flattened", "flattened, time first"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["gain of every position", "time first", *FLATTENED])
def test_on_any_number(name: str, size: int, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(Bare(*BODIES[name])), caplog, history=HISTORIES[:size])


COMPUTED: dict[str, tuple[dict[str, tuple[int, ...]], Body]] = {
    "gain squared": ({"g": (4,)}, lambda p, x: (x * p["g"] * p["g"].exp()).sum(1)),
    "parameter times itself": ({"g": (4,)}, lambda p, x: x.sum(1) * (p["g"] * p["g"])),
    "both factors of a product": ({"g": (5, 5)}, lambda p, x: x.mT.matmul(p["g"] @ p["g"]).sum(2)),
    "one argument in two roles": (
        {"g": (1, 1)},
        lambda p, x: x.sum(1) * F.linear(p["g"], p["g"]),
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", COMPUTED)
def test_functions_of_a_parameter(name: str, size: int, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(Bare(*COMPUTED[name])), caplog, history=HISTORIES[:size])


UNSEEN: dict[str, tuple[dict[str, tuple[int, ...]], Body]] = {
    "a function without a rule": ({"g": (4,)}, lambda p, x: torch.hypot(x, p["g"]).sum(1)),
    "a gain and a function without a rule": (
        {"g": (4,)},
        lambda p, x: torch.hypot(x * p["g"], p["g"]).sum(1),
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_other_uses_fall_back(name: str, caplog: pytest.LogCaptureFixture) -> None:
    body = Bare(*UNSEEN[name])
    assert_right(Recommender(body), caplog, fallback=["body.parameter.g"])


@pytest.mark.parametrize("name", ["time first", "scalar gain"])
def test_one_sequence_of_one(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Which dimension is the sequences' does not matter, and is no reason to fall back."""
    assert_right(Recommender(Bare(*BODIES[name])), caplog, history=HISTORIES[:1, -1:])


class LastOfAll(nn.Module):
    """A layer at every position, and the state after the last item, rows filled from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        last = (history != 0).sum(1) - 1
        return torch.tanh(self.dense(x))[torch.arange(len(x)), last]


def test_what_can_be_read_two_ways_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """The first of two sequences uses the first of two positions, the last the last."""
    names = ["items.weight", "body.dense.weight", "body.dense.bias"]
    history = torch.tensor([[3, 0], [5, 4]])
    assert_right(Recommender(LastOfAll()), caplog, fallback=names, history=history)
    caplog.clear()
    assert_right(Recommender(LastOfAll()), caplog, history=torch.tensor([[3, 2], [5, 4]]))


class SomeRows(nn.Module):
    """A product of the items alone, packed: (P, D), which is (N·T, D) of no N and T."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        items = history != 0
        return torch.zeros_like(x).index_put((items,), self.dense(x[items])).tanh().sum(1)


# 9 items of 3 sequences, which 3 divides; 8 of 2, which 2 divides; 15 of 4.
@pytest.mark.parametrize("rows", [slice(0, 3), slice(0, 2), slice(1, 5)])
def test_packed_positions_fall_back(rows: slice, caplog: pytest.LogCaptureFixture) -> None:
    names = ["body.dense.weight", "body.dense.bias"]
    assert_right(Recommender(SomeRows()), caplog, fallback=names, history=HISTORIES[rows])


class Norm(nn.Module):
    """A norm of (N, T, D), or of (N, D, T) where its channels are dimension 1."""

    def __init__(self, norm: nn.Module, channel: bool) -> None:
        super().__init__()
        self.norm, self.channel = norm, channel

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        if self.channel:
            return torch.tanh(self.norm(x.transpose(1, 2))).sum(2)
        return torch.tanh(self.norm(x)).sum(1)


def batch_norm(running: bool) -> nn.Module:
    norm = nn.BatchNorm1d(4, track_running_stats=running)
    if running:
        norm.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
        norm.running_var.copy_(torch.tensor([0.5, 1.5, 2.0, 1.0]))
    return norm


NORMS = {
    "layer": lambda: Norm(nn.LayerNorm(4), False),
    "layer, of two dimensions": lambda: Norm(nn.LayerNorm((5, 4)), False),
    "root mean square": lambda: Norm(nn.RMSNorm(4), False),
    "batch": lambda: Norm(batch_norm(True), True),
    "groups": lambda: Norm(nn.GroupNorm(2, 4), True),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(NORMS[name]()), caplog)


def test_batch_norm_of_states(caplog: pytest.LogCaptureFixture) -> None:
    """(N, D), where every dimension but the channels' is the sequences'."""

    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batch_norm(True)

        def forward(self, x: Tensor, history: Tensor) -> Tensor:
            return torch.tanh(self.norm(x.sum(1)))

    assert_right(Recommender(States()), caplog, history=HISTORIES[:4])


@pytest.mark.parametrize("size", [5, 3])
def test_grams_do_not_depend_on_the_layout(size: int) -> None:
    """Which positions count is read off the gradient, in the order of the inputs."""

    class Masked(nn.Module):
        def __init__(self, time_first: bool) -> None:
            super().__init__()
            self.time_first = time_first
            self.dense = nn.Linear(4, 4)

        def forward(self, x: Tensor, history: Tensor) -> Tensor:
            y = self.dense(x.transpose(0, 1)).transpose(0, 1) if self.time_first else self.dense(x)
            return (torch.tanh(y) * (history != 0)[..., None]).sum(1)

    models = [shaken(Recommender(Masked(time_first))) for time_first in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    found = [fk.linear_grams(m, [HISTORIES[:size]], progress=False) for m in models]
    x = models[0].items(HISTORIES[:size])[HISTORIES[:size] != 0]
    expected = x.T @ x / len(x)
    for grams in found:
        torch.testing.assert_close(grams["body.dense.weight"], expected, rtol=1e-12, atol=0)


def test_batch_norm_by_the_batch_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """Of one sequence, as those of several would be mixed."""
    names = ["body.norm.weight", "body.norm.bias"]
    body = Norm(batch_norm(False), True)
    assert_right(Recommender(body), caplog, fallback=names, history=HISTORIES[:1])
