"""Draws with and without replacement: their twins, their distributions, their weights."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from torch import Tensor

from fisherkern import ops
from fisherkern.ops.sample_distinct import given_maximum, sample_distinct_reference
from fisherkern.ops.sample_items import sample_items_reference

# (N, V, D): one of everything, primes, a range of 256 items and one beside it.
SHAPES = [(1, 1, 1), (3, 7, 5), (5, 255, 8), (5, 256, 8), (5, 257, 8), (7, 1031, 13)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 256 items and a few rows at a time, so that there are several of both."""
    monkeypatch.setattr(sys.modules["fisherkern.ops.softmax_lse"], "TILE_ELEMENTS", 1)
    monkeypatch.setattr(sys.modules["fisherkern.ops.sample_items"], "_ELEMENTS", 2**13)


def layer(n: int, v: int, d: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n * v + d)
    return tuple(torch.randn(*shape, generator=g) for shape in ((n, d), (v, d), (v,)))


def drawn_from(h: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> tuple:
    lse, _, ranges = ops.softmax_mean(h, weight, bias)
    return h, weight, bias, lse, ranges, rows


@pytest.mark.parametrize("shape", SHAPES)
def test_sample_items(shape: tuple[int, int, int]) -> None:
    h, weight, bias = layer(*shape)
    rows = torch.arange(10, 10 + shape[0])
    found = ops.sample_items(*drawn_from(h, weight, bias, rows), 40, 3)
    exact = sample_items_reference(h, weight, bias, rows, 40, 3)
    # A draw within rounding of a step of the distribution may fall on its other side.
    assert float((found != exact).double().mean()) <= 0.01
    double = [t.double() for t in (h, weight, bias)]
    assert torch.equal(ops.sample_items(*drawn_from(*double, rows), 40, 3), exact)


def test_sample_items_follows_the_softmax() -> None:
    h, weight, bias = layer(1, 9, 4)
    rows, draws = torch.arange(4000), 5
    many = h.expand(4000, -1)
    ids = ops.sample_items(*drawn_from(many, weight, bias, rows), draws, 0)
    p = (h @ weight.T + bias).softmax(1)[0]
    share = torch.bincount(ids.flatten(), minlength=9) / ids.numel()
    assert ((share - p).abs() < 5 * (p * (1 - p) / ids.numel()).sqrt() + 1e-4).all()
    other = ops.sample_items(*drawn_from(many, weight, bias, rows), draws, 1)
    assert float((ids == other).double().mean()) < 0.9


def test_sample_items_takes_no_impossible_item() -> None:
    """Only two items of 600 are possible, one of them first in its range, one last."""
    h, weight, bias = layer(400, 600, 2)
    bias[:] = -torch.inf
    bias[[256, 511]] = 0.0
    ids = ops.sample_items(*drawn_from(h, weight, bias, torch.arange(400)), 20, 0)
    assert set(ids.unique().tolist()) == {256, 511}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 5, 300])
def test_sample_distinct(shape: tuple[int, int, int], k: int) -> None:
    h, weight, bias = layer(*shape)
    k = min(k, shape[1])
    rows = torch.arange(10, 10 + shape[0])
    double = [t.double() for t in (h, weight, bias)]
    ids, omega = ops.sample_distinct(*drawn_from(*double, rows), k, 3)
    exact_ids, exact_omega = sample_distinct_reference(h, weight, bias, rows, k, 3)
    assert torch.equal(ids, exact_ids)
    torch.testing.assert_close(omega, exact_omega, rtol=1e-9, atol=0)
    assert all(len(set(row.tolist())) == k for row in ids)
    ids, omega = ops.sample_distinct(*drawn_from(h, weight, bias, rows), k, 3)
    assert omega.dtype == torch.float32
    same = (ids == exact_ids).all(dim=1)
    assert float(same.double().mean()) > 0.7  # fp32 may swap two neighbours of 300
    torch.testing.assert_close(omega[same].double(), exact_omega[same], rtol=1e-3, atol=1e-9)


def test_sample_distinct_draws_in_the_order_of_draws_without_replacement() -> None:
    """P(a, b, ...) = p_a · p_b / (1 − p_a) · ..., for every ordered pair (Plackett and Luce).

    The possible items lie in different ranges, so that ranges' maxima must compete rightly.
    """
    places = torch.tensor([3, 200, 256, 700])
    weight, bias = torch.zeros(701, 1), torch.full((701,), -torch.inf)
    bias[places] = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
    p = bias[places].exp().double()
    repeats = 20000
    h, rows = torch.zeros(repeats, 1), torch.arange(repeats)
    ids, omega = ops.sample_distinct(*drawn_from(h, weight, bias, rows), 2, 0)
    index = torch.searchsorted(places, ids)
    assert torch.equal(places[index], ids)
    for a, b in itertools.permutations(range(4), 2):
        expected = float(p[a] * p[b] / (1 - p[a]))
        found = float(((index[:, 0] == a) & (index[:, 1] == b)).double().mean())
        assert abs(found - expected) < 5 * (expected * (1 - expected) / repeats) ** 0.5, (a, b)
    # E[Σ_j ω_j f(y_j)] = Σ_v p(v) f(v): f the indicator of each item.
    for a in range(4):
        sample = (omega.double() * (index == a)).sum(dim=1)
        assert abs(float(sample.mean() - p[a])) < 5 * float(sample.std()) / repeats**0.5


@pytest.mark.parametrize("k", [1, 3, 40])
def test_sample_distinct_weights_are_unbiased(k: int) -> None:
    h, weight, bias = layer(1, 600, 3)
    repeats = 4000
    many, rows = h.expand(repeats, -1), torch.arange(repeats)
    ids, omega = ops.sample_distinct(*drawn_from(many, weight, bias, rows), k, 1)
    p = (h.double() @ weight.double().T + bias.double()).softmax(dim=1)[0]
    f = torch.linspace(-1, 2, 600).double() ** 3
    sample = (omega.double() * f[ids]).sum(dim=1)
    assert abs(float(sample.mean() - p @ f)) < 5 * float(sample.std()) / repeats**0.5
    total = omega.double().sum(dim=1)
    assert abs(float(total.mean() - 1)) < 5 * float(total.std()) / repeats**0.5


def test_sample_distinct_of_all_items_is_the_softmax() -> None:
    h, weight, bias = (t.double() for t in layer(3, 300, 4))
    ids, omega = ops.sample_distinct(*drawn_from(h, weight, bias, torch.arange(3)), 300, 0)
    assert torch.equal(ids, torch.arange(300).expand(3, -1))
    torch.testing.assert_close(omega, (h @ weight.T + bias).softmax(dim=1))


def test_sample_distinct_with_fewer_possible_items_than_k() -> None:
    h, weight, bias = layer(5, 600, 2)
    bias[:] = -torch.inf
    bias[[100, 599]] = 0.0
    ids, omega = ops.sample_distinct(*drawn_from(h, weight, bias, torch.arange(5)), 4, 0)
    assert all(len(set(row)) == 4 and {100, 599} <= set(row) for row in ids.tolist())
    assert int(ids.max()) < 600
    p = (h @ weight.T + bias).softmax(dim=1).gather(1, ids)
    torch.testing.assert_close(omega, p)


def test_sample_distinct_fills_up_inside_the_catalogue() -> None:
    """The likely range ends after two items, and places past the last are no items."""
    h, weight, bias = layer(5, 258, 2)
    bias[:256] = -torch.inf
    ids, omega = ops.sample_distinct(*drawn_from(h, weight, bias, torch.arange(5)), 4, 0)
    assert all(len(set(row)) == 4 and {256, 257} <= set(row) for row in ids.tolist())
    assert int(ids.max()) < 258 and omega.isfinite().all()


def test_given_maximum_of_far_values() -> None:
    """The literal −log(e^−M − e^−Z + e^−G) where it can be evaluated, and where it cannot."""
    perturbed = torch.tensor([[0.3, 1.2, -2.0, -torch.inf]], dtype=torch.float64)
    maximum = torch.tensor([2.0], dtype=torch.float64)
    found = given_maximum(perturbed, perturbed.amax(dim=1), maximum)
    literal = -(math.exp(-2.0) - math.exp(-1.2) + (-perturbed).exp()).log()
    torch.testing.assert_close(found, literal, rtol=1e-12, atol=1e-12)
    values = torch.tensor([[-800.0, -801.0]]).double()
    far = given_maximum(values, values.amax(dim=1), torch.tensor([900.0]).double())
    assert far[0, 0] == 900 and far.isfinite().all() and far[0, 1] < 0


@pytest.mark.parametrize("sampler", ["sample_items", "sample_distinct"])
def test_draws_do_not_depend_on_the_batch(sampler: str) -> None:
    h, weight, bias = (t.double() for t in layer(9, 700, 4))
    rows = torch.arange(9) * 7
    op = getattr(ops, sampler)
    whole = op(*drawn_from(h, weight, bias, rows), 6, 2)
    part = op(*drawn_from(h[4:6], weight, bias, rows[4:6]), 6, 2)
    if sampler == "sample_items":
        whole, part = (whole,), (part,)
    for all_rows, few in zip(whole, part, strict=True):
        torch.testing.assert_close(all_rows[4:6], few)
