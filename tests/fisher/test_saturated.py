"""Softmaxes with nearly all the mass on one item keep the accuracy of their Fisher."""

from __future__ import annotations

from typing import Any

import brute
import pytest
import torch
from models import HISTORIES, NUM_ITEMS, shaken
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.fisher.factors import samplers
from fisherkern.fisher.factors.item_table import ItemTable
from fisherkern.fisher.factors.saturated import SaturatedRows, complement

SAMPLERS: list[dict[str, Any]] = [
    {"sampler": "exact"},
    {"sampler": "exact", "tol": 0.0},
    {"sampler": "topk", "k": NUM_ITEMS + 1},
    {"sampler": "model", "k": NUM_ITEMS + 1, "replacement": False},
    {"sampler": "sketch", "probes": 64},
]


class Saturated(nn.Module):
    """A tied or untied table so large that one item has all the mass, in some rows or in all."""

    def __init__(self, scale: float, tied: bool, width: int = 4, bias: bool = False) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, width)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, NUM_ITEMS + 1, bias=bias)
        shaken(self)
        if tied:
            self.out.weight = self.items.weight
        with torch.no_grad():
            self.out.weight.mul_(scale)

    def forward(self, history: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.items(history))).mean(1))


class Whole(Saturated):
    """The same as logits that nothing is split off from."""

    def forward(self, history: Tensor) -> Tensor:
        return super().forward(history) * torch.ones(NUM_ITEMS + 1, dtype=torch.double).exp().log()


def assert_near(model: nn.Module, rtol: float, **settings: Any) -> None:
    """Each sequence alone, as the least saturated one hides the others, and all together."""
    parts = [HISTORIES[1:], *HISTORIES[1:].split(1)]
    found = [fk.diag_fisher(model, [part], progress=False, **settings) for part in parts]
    model.double()
    for part, fisher in zip(parts, found, strict=True):
        p, gradients = brute.near_gradients(model, part)
        for name, value in brute.fisher(gradients, p).items():
            gap = (fisher[name].double() - value).abs().max()
            assert float(gap) <= rtol * float(value.max()) + 1e-300, name


@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0, 200.0, 1000.0])
@pytest.mark.parametrize("kind", [Saturated, Whole])
def test_all_items_of_saturated_softmaxes(
    kind: type[Saturated], scale: float, tied: bool, settings: dict[str, Any]
) -> None:
    """Up to 1 − p of 1e-300, against gradients that no difference spoils."""
    assert_near(kind(scale, tied).double(), 1e-7, **settings)


@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scale", [1.0, 20.0, 60.0])
def test_in_float32(scale: float, tied: bool, settings: dict[str, Any]) -> None:
    """What is left of the accuracy is that of the logits themselves."""
    assert_near(Saturated(scale, tied, bias=True), 1e-3, **settings)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0, 200.0])
def test_a_streamed_sketch_with_a_bucket_for_each_item(
    scale: float, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact, as no two items meet."""
    monkeypatch.setattr(samplers, "_COVARIANCE_LIMIT", 0)
    assert_near(Saturated(scale, tied).double(), 1e-7, sampler="sketch", probes=NUM_ITEMS + 1)


@pytest.mark.parametrize("width", [3, 20])
def test_more_dimensions_than_items(width: int) -> None:
    """The closed factor of few items."""
    assert_near(Saturated(100.0, True, width).double(), 1e-7, sampler="exact")


def test_rows_are_found_where_a_range_of_items_has_the_mass() -> None:
    """And only those of one item."""
    h = torch.tensor([[40.0, 0.0], [0.0, 40.0], [1.0, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 1.0], [0.2, 1.0], [0.0, 0.0]], dtype=torch.float64)
    table = ItemTable(weight, None)
    found = SaturatedRows.among(h, table, torch.ones(3), torch.float64)
    assert found is not None and found.rows.tolist() == [0] and found.item.tolist() == [0]
    expected = torch.tensor([-32.0, -40.0], dtype=torch.float64).exp().sum()
    torch.testing.assert_close(found.rest[0], expected, rtol=1e-12, atol=0)
    assert found.place.tolist() == [0, -1, -1]
    assert SaturatedRows.among(h, table, torch.zeros(3), torch.float64) is None


def test_the_complement_of_a_probability_is_the_others_sum() -> None:
    p = torch.tensor([[1.0, 1e-30, 2e-30], [0.5, 0.25, 0.25]], dtype=torch.float64)
    expected = torch.tensor([[3e-30, 1.0, 1.0], [0.5, 0.75, 0.75]], dtype=torch.float64)
    torch.testing.assert_close(complement(p), expected, rtol=1e-12, atol=0)
