"""Models that keep tables of their parameters in evaluation mode: right, or refused by name."""

from __future__ import annotations

import functools
from typing import Any

import brute
import pytest
import torch
import torch.nn.functional as F
from helpers.fisher import assert_equal
from models import HISTORIES, NUM_ITEMS, shaken
from torch import Tensor, nn

import fisherkern as fk

WIDTH = 4


class Anew(nn.Module):
    """A table of normed rows, computed in every pass."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, WIDTH)
        self.other = self.items if tied else nn.Embedding(NUM_ITEMS + 1, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.kept: Any = None
        self.full = False

    def table(self) -> Tensor:
        return 3 * F.normalize(self.other.weight, dim=1)

    def cached(self) -> Tensor:
        return self.table()

    def forward(self, history: Tensor) -> Tensor:
        rows = self.table() if self.training else self.cached()
        return torch.tanh(self.mix(self.items(history))).sum(1) @ rows.T


class Detached(Anew):
    def cached(self) -> Tensor:
        if self.kept is None:
            self.kept = self.table().detach()
        return self.kept


class NoGrad(Anew):
    def cached(self) -> Tensor:
        if self.kept is None:
            with torch.no_grad():
                self.kept = self.table()
        return self.kept


class WithGraph(Anew):
    """Ours when nobody else has filled it: attributes are put back after every pass."""

    def cached(self) -> Tensor:
        if not self.full:
            self.kept, self.full = self.table(), True
        return self.kept


class InDictionary(Anew):
    def __init__(self, tied: bool) -> None:
        super().__init__(tied)
        self.kept = {}

    def cached(self) -> Tensor:
        if "table" not in self.kept:
            self.kept["table"] = self.table().detach()
        return self.kept["table"]


class Remembered(Anew):
    @functools.lru_cache  # noqa: B019
    def cached(self) -> Tensor:
        return self.table().detach()


class RememberedWithGraph(Anew):
    @functools.lru_cache  # noqa: B019
    def cached(self) -> Tensor:
        return self.table()


class CachedProperty(Anew):
    @functools.cached_property
    def rows(self) -> Tensor:
        return self.table().detach()

    def cached(self) -> Tensor:
        return self.rows


class Buffer(Anew):
    def __init__(self, tied: bool) -> None:
        super().__init__(tied)
        del self.kept
        self.register_buffer("kept", None, persistent=False)

    def cached(self) -> Tensor:
        if self.kept is None:
            self.kept = self.table().detach()
        return self.kept


class WrittenBuffer(Anew):
    def __init__(self, tied: bool) -> None:
        super().__init__(tied)
        del self.kept
        self.register_buffer("kept", torch.zeros(NUM_ITEMS + 1, WIDTH))

    def cached(self) -> Tensor:
        if not self.full:
            self.kept.copy_(self.table().detach())
            self.full = True
        return self.kept


class Parameter(Anew):
    """The table is the parameter itself."""

    def table(self) -> Tensor:
        return self.other.weight

    def cached(self) -> Tensor:
        if self.kept is None:
            self.kept = self.other.weight.detach().clone()
        return self.kept


class View(Parameter):
    """Of its storage, without a gradient."""

    def cached(self) -> Tensor:
        if self.kept is None:
            self.kept = self.other.weight.detach()
        return self.kept


class Quietly(Anew):
    """Kept by nobody, and without gradients in evaluation mode alone."""

    def cached(self) -> Tensor:
        with torch.no_grad():
            return self.table()


REFUSED = {
    Detached: r"'kept' \(12, 4\) that an earlier pass",
    NoGrad: r"'kept' \(12, 4\) that an earlier pass",
    InDictionary: r"'kept' \(12, 4\) that an earlier pass",
    Remembered: r"no attribute holds \(12, 4\) that an earlier pass",
    RememberedWithGraph: r"no attribute holds \(12, 4\) that an earlier pass",
    CachedProperty: r"'rows' \(12, 4\) that an earlier pass",
    Buffer: r"'kept' \(12, 4\) that an earlier pass",
    WrittenBuffer: r"'kept' \(12, 4\) that an earlier pass",
    Parameter: r"'kept' \(12, 4\) that an earlier pass",
    View: r"'(kept|other)\S*' \(12, 4\) that an earlier pass",
    Quietly: r"a tensor \(12, 4\) that evaluation mode makes .* without gradients",
}


def fisher(model: nn.Module, **settings: Any) -> fk.DiagFisher:
    return fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False, **settings)


def right(model: nn.Module, found: fk.DiagFisher) -> None:
    plain = Anew(model.other is model.items).double()
    plain.load_state_dict(model.state_dict())
    p, gradients = brute.all_gradients(plain, HISTORIES)
    assert_equal(found, brute.fisher(gradients, p))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_pass_keeps_without_gradients_is_refused(
    kind: type[Anew], tied: bool, filled: bool, training: bool
) -> None:
    model = shaken(kind(tied)).eval()
    if filled:
        with torch.no_grad():
            model(HISTORIES)
    model.train(training)
    with pytest.raises(fk.InputError, match=REFUSED[kind]):
        fisher(model)
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("tied", [False, True])
def test_a_graph_that_a_pass_keeps_in_an_attribute_is_made_anew(tied: bool) -> None:
    model = shaken(WithGraph(tied))
    right(model, fisher(model))
    assert model.kept is None and not model.full
    model.eval()(HISTORIES)
    with pytest.raises(fk.InputError, match=r"'kept' \(12, 4\) that an earlier pass"):
        fisher(model)


def test_frozen_tables_may_be_kept() -> None:
    model = shaken(Detached(False))
    model.other.weight.requires_grad_(False)
    plain = Anew(False).double()
    plain.load_state_dict(model.state_dict())
    plain.other.weight.requires_grad_(False)
    p, gradients = brute.all_gradients(plain, HISTORIES)
    assert_equal(fisher(model), brute.fisher(gradients, p))


class Harmless(Anew):
    """Constants that a pass keeps, and what it keeps for others to see."""

    def __init__(self, tied: bool) -> None:
        super().__init__(tied)
        self.places: dict[int, Tensor] = {}
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.prior = torch.linspace(-1, 1, NUM_ITEMS + 1, dtype=torch.float64)
        self.mix.bias.data.zero_()

    def forward(self, history: Tensor) -> Tensor:
        length = history.shape[1]
        if length not in self.places:
            self.places[length] = torch.arange(length * WIDTH).view(length, WIDTH).cos()
        states = self.mix(self.items(history)) + self.places[length] - self.mean
        logits = torch.tanh(states).sum(1) @ self.table().T
        if not self.training:
            self.seen = states.detach()
            logits = logits + self.prior
        top = logits.amax(1, keepdim=True)
        return logits - top.detach()


@pytest.mark.parametrize("tied", [False, True])
def test_constants_and_what_goes_nowhere_may_be_kept(tied: bool) -> None:
    torch.manual_seed(0)
    model = Harmless(tied).double().eval()
    p, gradients = brute.all_gradients(model, HISTORIES)
    assert_equal(fisher(model), brute.fisher(gradients, p))


def test_a_training_mode_of_its_own_is_left_as_it_was() -> None:
    """It counts, draws, asks for more than a history, and is not put on the model."""

    class Counting(Harmless):
        def __init__(self) -> None:
            super().__init__(True)
            self.steps = 0
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, history: Tensor) -> Tensor:
            self.norm(self.items(history).sum(1))
            if self.training:
                self.steps += 1
                torch.rand(3)
                raise RuntimeError("labels are missing")
            return super().forward(history)

    model = Counting().double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    model.norm.requires_grad_(False)
    fisher(model)
    assert model.steps == 0 and model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_constants_of_any_layout_and_type_may_be_kept() -> None:
    class Mixing(Anew):
        def __init__(self) -> None:
            super().__init__(True)
            self.register_buffer("graph", torch.eye(NUM_ITEMS + 1).to_sparse())
            self.register_buffer("coarse", torch.ones(WIDTH).to(torch.float8_e4m3fn))
            self.empty = torch.zeros(0, WIDTH, dtype=torch.float64)

        def table(self) -> Tensor:
            rows = torch.cat([self.empty, self.graph.double() @ self.other.weight])
            return rows * self.coarse.double()

    model = shaken(Mixing()).double()
    model.coarse = torch.ones(WIDTH).to(torch.float8_e4m3fn)
    p, gradients = brute.all_gradients(model, HISTORIES)
    assert_equal(fisher(model), brute.fisher(gradients, p))
