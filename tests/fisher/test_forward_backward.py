"""Chunks in pieces and probes in blocks: the same Fisher, whatever a backward pass allows."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import brute
import pytest
import torch
from helpers.fisher import assert_equal
from models import HISTORIES, NUM_ITEMS, Foreign, bert, shaken
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.fisher import forward_backward
from fisherkern.fisher.schedule import Schedule


def exact(model: nn.Module) -> dict[str, Tensor]:
    p, gradients = brute.all_gradients(model, HISTORIES)
    return brute.fisher(gradients, p)


def scheduled(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    monkeypatch.setattr(Schedule, "of", lambda device: schedule)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the numbers of probes of all backward passes are noted."""
    sizes: list[int] = []
    gradients = forward_backward.ForwardBackward._gradients

    def noted(self: Any, forward: Any, given: Tensor, retain: bool) -> Any:
        found = gradients(self, forward, given, retain)
        if found is not None:
            sizes.append(len(given))
        return found

    monkeypatch.setattr(forward_backward.ForwardBackward, "_gradients", noted)
    return sizes


# Positions that fill a backward pass, elements of a block's gradients, how many passes, of how
# many of the six probes at most.
SIZES = [
    (1, 1, 5 * 6, 1),
    (1, 10**6, 5, 6),
    (60, 8000, 2, 3),
    (300, 2000, 6, 1),
    (300, 10**6, 1, 6),
]


@pytest.mark.parametrize(("positions", "elements", "count", "largest"), SIZES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_fisher_does_not_depend_on_blocks_or_pieces(
    positions: int,
    elements: int,
    count: int,
    largest: int,
    tied: bool,
    monkeypatch: pytest.MonkeyPatch,
    blocks: list[int],
) -> None:
    scheduled(monkeypatch, Schedule(positions, elements))
    model = bert(tied)
    found = fk.diag_fisher(model, [HISTORIES], sampler="exact", check=False, progress=False)
    assert_equal(found, exact(model))
    assert (len(blocks), max(blocks)) == (count, largest)


@pytest.mark.parametrize("tie", ["matmul", "module", "none"])
def test_logits_go_back_in_blocks_too(
    tie: str, monkeypatch: pytest.MonkeyPatch, blocks: list[int]
) -> None:
    scheduled(monkeypatch, Schedule(100, 2**25, 5 * (NUM_ITEMS + 1) * 3))
    model = shaken(Foreign(tie))
    # No linear map, so that no output layer is split off.
    subject = fk.adapt(model, logits=lambda model, batch: model(batch).clamp(-1e9, 1e9))
    fisher = fk.diag_fisher(subject, [HISTORIES], sampler="exact", check=False, progress=False)
    assert_equal(fisher, exact(model))
    # The last of its two passes has two sequences, the first three, not four beside five positions.
    assert blocks == [7, 5, 5, 5, 2]


class _Numpy(torch.autograd.Function):
    """2 x, by NumPy, which sees one probe at a time only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.detach().numpy())

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return torch.from_numpy(2 * delta.numpy())


torch.library.define("fisherkern_tests::doubled", "(Tensor x) -> Tensor")
torch.library.impl("fisherkern_tests::doubled", "cpu")(lambda x: 2 * x)


class _NoRule(torch.autograd.Function):
    """2 x, by an operator that nobody has told what to do with many probes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return torch.ops.fisherkern_tests.doubled(delta)


class Doubling(Foreign):
    def __init__(self, twice: Callable[[Tensor], Tensor]) -> None:
        super().__init__("none")
        self.twice = twice

    def forward(self, history: Tensor) -> Tensor:
        return self.decoder(self.twice(self.hidden(history)))


@pytest.mark.parametrize("double", [_Numpy.apply, _NoRule.apply])
def test_a_backward_pass_for_one_probe_is_called_for_one(
    double: Any, blocks: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = shaken(Doubling(double))
    with warnings.catch_warnings(record=True) as said, caplog.at_level(logging.INFO, "fisherkern"):
        warnings.simplefilter("always")
        fisher = fk.diag_fisher(
            model, [HISTORIES] * 2, sampler="exact", check=False, progress=False
        )
    assert_equal(fisher, exact(model))
    assert set(blocks) == {1} and not said and not caplog.records


def test_a_fault_of_the_model_is_its_own(blocks: list[int]) -> None:
    class Fails(_NoRule):
        @staticmethod
        def backward(ctx: Any, delta: Tensor) -> Tensor:
            raise RuntimeError("no backward pass today")

    model = shaken(Doubling(Fails.apply))
    with pytest.raises(RuntimeError, match="no backward pass today"):
        fk.diag_fisher(model, [HISTORIES], sampler="exact", check=False, progress=False)


def buckets(model: nn.Module, batch: Any, positions: int) -> list[tuple[Any, Tensor]]:
    schedule = Schedule(positions, 2**25)
    return list(schedule.length_buckets(ModelAdapter.of(model), batch, len(batch)))


def lengths(history: Tensor) -> Tensor:
    return (history != 0).sum(dim=1)


def test_pieces_are_filled_from_long_to_short() -> None:
    g = torch.Generator().manual_seed(0)
    history = torch.randint(1, NUM_ITEMS + 1, (50, 5), generator=g)
    for row, padding in zip(history, torch.randint(0, 6, (50,), generator=g), strict=True):
        row[:padding] = 0
    found = buckets(bert(), history, 24)
    assert sorted(torch.cat([which for _, which in found]).tolist()) == list(range(50))
    least = 99
    for part, which in found:
        assert torch.equal(part, history[which]) and bool((which.diff() > 0).all())
        assert len(which) <= 24 // (int(lengths(part).max()) + 1)
        assert int(lengths(part).max()) <= least
        least = int(lengths(part).min())


def test_pieces_of_other_models_keep_the_order_and_of_other_batches_the_whole() -> None:
    foreign = Foreign("none")
    found = [(part, w.tolist()) for part, w in buckets(foreign, HISTORIES, 2 * 5)]
    assert [w for _, w in found] == [[0, 1], [2, 3], [4]]
    assert all(torch.equal(part, HISTORIES[w]) for part, w in found)
    rows = HISTORIES.numpy()
    ((part, which),) = buckets(foreign, rows, 2 * 5)
    assert part is rows and which.tolist() == [0, 1, 2, 3, 4]


def test_blocks_that_do_not_fit_into_memory_are_halved(
    monkeypatch: pytest.MonkeyPatch, blocks: list[int]
) -> None:
    gradients = forward_backward.ForwardBackward._gradients

    def limited(self: Any, forward: Any, given: Tensor, retain: bool) -> Any:
        if len(given) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradients(self, forward, given, retain)

    monkeypatch.setattr(forward_backward.ForwardBackward, "_gradients", limited)
    model = bert(True)
    assert_equal(
        fk.diag_fisher(model, [HISTORIES], sampler="exact", check=False, progress=False),
        exact(model),
    )
    assert max(blocks) == 2 and sum(blocks) == 6


def test_memory_that_is_too_little_for_one_probe_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forward_backward.ForwardBackward, "_gradients", never)
    with pytest.raises(torch.OutOfMemoryError):
        fk.diag_fisher(bert(True), [HISTORIES], sampler="exact", check=False, progress=False)
