"""Batches of every kind are cut to batches of their kind, and handed over as models take them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import brute
import numpy as np
import pytest
import torch
from helpers.fisher import assert_equal
from helpers.strangers import (
    COLUMNS,
    EveryPosition,
    Linear,
    expected,
)
from models import HISTORIES, shaken
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.adapters.batches import batch_size, batch_take, to_device


class Features(NamedTuple):
    ids: Tensor
    mask: Tensor


@dataclasses.dataclass
class Record:
    ids: Tensor
    users: list[str]
    extra: Mapping[str, Any]


NESTED = {
    "features": {"ids": HISTORIES, "position_ids": torch.arange(5)[None]},
    "users": list("abcde"),
    "scale": 2.0,
}


@pytest.mark.parametrize(
    "batch",
    [
        NESTED,
        Features(HISTORIES, HISTORIES != 0),
        Record(HISTORIES, list("abcde"), {"rows": HISTORIES.numpy(), "none": None}),
        (HISTORIES, torch.arange(5)),
        [HISTORIES, {"lengths": torch.arange(5)}],
        HISTORIES.numpy(),
    ],
)
def test_batches_are_cut_to_batches_of_their_kind(batch: Any) -> None:
    assert batch_size(batch) == 5
    for index in (slice(1, 3), torch.tensor([1, 2])):
        part = batch_take(batch, index)
        assert type(part) is type(batch) and batch_size(part) == 2
    moved = to_device(batch, torch.device("cpu"))
    assert type(moved) is type(batch)


def test_what_all_sequences_share_is_not_cut() -> None:
    part = batch_take(NESTED, slice(1, 3))
    assert part["features"]["position_ids"].shape == (1, 5)
    assert part["users"] == ["b", "c"] and part["scale"] == 2.0
    rows = batch_take({"x": np.arange(10).reshape(5, 2)}, torch.tensor([4, 0]))
    assert rows["x"].tolist() == [[8, 9], [0, 1]]


def test_tensors_of_other_lengths_are_refused_by_name() -> None:
    with pytest.raises(fk.InputError, match="history has 5, target has 4"):
        batch_size({"history": HISTORIES, "target": torch.arange(4)})


class ByName(Linear):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids * (1 if attention_mask is None else attention_mask))


class WithLengths(Linear):
    """A second argument: how many places each sequence has, padded on the right."""

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.out(self.states(ids)[torch.arange(len(ids)), lengths - 1])


def test_a_batch_is_handed_over_as_forward_takes_it() -> None:
    model = shaken(ByName())
    batch = {"input_ids": HISTORIES, "attention_mask": (HISTORIES != 0).long(), "user": [1] * 5}
    fisher = fk.diag_fisher(model, [batch], sampler="exact", progress=False)
    assert_equal(fisher, expected(model))
    pair = shaken(WithLengths())
    lengths = torch.tensor([5, 3, 2, 5, 1])
    fisher = fk.diag_fisher(pair, [(HISTORIES, lengths)], sampler="exact", progress=False)
    rows = [
        brute.all_gradients(nn.Sequential(_Fixed(pair, lengths[i : i + 1])), HISTORIES[i : i + 1])
        for i in range(5)
    ]
    totals = {
        name.removeprefix("0.model."): sum(
            torch.einsum("nv,nv...->...", p, g[name].square()) for p, g in rows
        )
        / 5
        for name in rows[0][1]
    }
    assert_equal(fisher, totals)


class _Fixed(nn.Module):
    def __init__(self, model: nn.Module, lengths: Tensor) -> None:
        super().__init__()
        self.model, self.lengths = model, lengths

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, self.lengths)


def test_the_last_position_is_the_last_real_one() -> None:
    """Padded on the right with a mask: what a mask hides is not asked."""

    class Masked(EveryPosition):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.out(self.states(input_ids))

    model = shaken(Masked())
    lengths = [3, 5, 1, 4, 2]
    ids = torch.zeros(5, 5, dtype=torch.int64)
    for row, length in zip(range(5), lengths, strict=True):
        ids[row, :length] = HISTORIES[1, :length]
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    z = fk.adapt(model)(batch)
    every = model(ids, None)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(z[row], every[row, length - 1])
    with pytest.raises(fk.InputError, match="some sequences end in 0"):
        plain = shaken(_NoPadding())
        fk.diag_fisher(plain, [ids], progress=False)


class _NoPadding(EveryPosition):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(COLUMNS, 6)


class OfTensors(nn.Module):
    """Takes the histories themselves, under a name that says nothing, and counts its calls."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(num_items + 1, 4)
        self.dense = nn.Linear(4, num_items)
        self.first_item = 1
        self.given: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(type(x))
        return self.dense(self.items(x).mean(1))


class OfMappings(OfTensors):
    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        return super().forward(x["history"])


def test_a_model_of_tensors_takes_our_batches() -> None:
    """`data.loader()` gives mappings; a model of tensors gets their histories."""
    data = fk.synthetic(40, 20, min_length=5, max_length=8)
    loader = data.loader(split="train", batch_size=16, max_len=5)
    one, other = OfTensors(data.num_items), OfMappings(data.num_items)
    fishers = [fk.diag_fisher(model, loader, progress=False) for model in (one, other)]
    assert all(torch.equal(fishers[0][name], value) for name, value in fishers[1].items())
    reports = [fk.evaluate(model, data) for model in (one, other)]
    assert dict(reports[0]) == dict(reports[1])
    target = fk.diag_fisher(one, loader, sampler="target", progress=False)
    assert target["dense.weight"].sum() > 0
    # The mapping was tried once.
    assert one.given.count(dict) == 1


def test_a_model_s_own_error_is_what_is_raised() -> None:
    model = OfMappings(5)
    with pytest.raises(KeyError, match="history"):
        fk.diag_fisher(model, [{"items": torch.ones(2, 3, dtype=torch.long)}], progress=False)
    with pytest.raises(IndexError, match="out of range"):
        fk.diag_fisher(OfTensors(5), [{"history": torch.full((2, 3), 99)}], progress=False)
