"""Every op against its float64 twin where tiles end, and under torch.library's checks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fisherkern import ops
from fisherkern.ops import counter
from fisherkern.ops.head_sqgrad import head_sqgrad_reference
from fisherkern.ops.sample_items import sample_items_reference
from fisherkern.ops.segment_outer_square import segment_outer_square_reference
from fisherkern.ops.softmax_lse import softmax_lse_reference
from fisherkern.ops.softmax_moments import softmax_moments_reference
from fisherkern.ops.softmax_sketch import softmax_sketch_reference
from fisherkern.ops.softmax_topk import softmax_topk_reference

# (N, V, D): one of everything, primes, a tile of 256 items and one beside it.
SHAPES = [(1, 1, 1), (3, 7, 5), (5, 255, 8), (5, 256, 8), (5, 257, 8), (7, 1031, 13)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 256 items, so that small catalogues span several."""
    monkeypatch.setattr(sys.modules["fisherkern.ops.softmax_lse"], "TILE_ELEMENTS", 1)


def layer(n: int, v: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n * v + d)
    h, weight, bias = (torch.randn(*shape, generator=g) for shape in ((n, d), (v, d), (v,)))
    return h.to(dtype), weight.to(dtype), bias.to(dtype)


def assert_close(found: Tensor, exact: Tensor, factor: float = 1.0) -> None:
    """Error at most `factor` × 1e-5 of the largest entry."""
    error = float((found.double() - exact).abs().max())
    assert error <= factor * 1e-5 * max(float(exact.abs().max()), 1e-30), error


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_lse(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, weight, bias = layer(*shape, dtype)
    for b in (bias, None):
        found = ops.softmax_lse(h, weight, b)
        assert found.dtype == torch.float32
        assert_close(found, softmax_lse_reference(h, weight, b))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_topk(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, weight, bias = layer(*shape, dtype)
    k = min(shape[1], 50)
    p, ids, lse = ops.softmax_topk(h, weight, bias, k)
    exact_p, exact_ids, exact_lse = softmax_topk_reference(h, weight, bias, k)
    assert torch.equal(ids, exact_ids)
    assert_close(p, exact_p)
    assert_close(lse, exact_lse)


def test_softmax_topk_gives_ties_to_the_lower_id() -> None:
    """Small integers, so that products are exact and ties are ties in every precision."""
    g = torch.Generator().manual_seed(0)
    h = torch.randint(-2, 3, (6, 3), generator=g).float()
    weight = torch.randint(-2, 3, (600, 3), generator=g).float()
    for k in (1, 5, 128, 600):
        _, ids, _ = ops.softmax_topk(h, weight, None, k)
        assert torch.equal(ids, softmax_topk_reference(h, weight, None, k)[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_sample_items(shape: tuple[int, int, int]) -> None:
    h, weight, bias = layer(*shape)
    rows = torch.arange(10, 10 + shape[0])
    lse = ops.softmax_lse(h, weight, bias)
    found = ops.sample_items(h, weight, bias, lse, rows, 40, 3)
    exact = sample_items_reference(h, weight, bias, rows, 40, 3)
    # A draw within rounding of a step of the distribution may fall on its other side.
    assert float((found != exact).double().mean()) <= 0.01
    double = [t.double() for t in (h, weight, bias)]
    found = ops.sample_items(*double, ops.softmax_lse(*double), rows, 40, 3)
    assert torch.equal(found, exact)


def test_sample_items_follows_the_softmax() -> None:
    h, weight, bias = layer(1, 9, 4)
    rows, draws = torch.arange(4000), 5
    many = h.expand(4000, -1)
    lse = ops.softmax_lse(many, weight, bias)
    ids = ops.sample_items(many, weight, bias, lse, rows, draws, 0)
    p = (h @ weight.T + bias).softmax(1)[0]
    share = torch.bincount(ids.flatten(), minlength=9) / ids.numel()
    assert ((share - p).abs() < 5 * (p * (1 - p) / ids.numel()).sqrt() + 1e-4).all()
    other = ops.sample_items(many, weight, bias, lse, rows, draws, 1)
    assert float((ids == other).double().mean()) < 0.9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_moments(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, weight, bias = layer(*shape, dtype)
    lse = ops.softmax_lse(h, weight, bias)
    mean = ops.softmax_mean(h, weight, bias, lse)
    covariance = ops.softmax_covariance(h, weight, bias, lse, mean)
    exact_mean, exact = softmax_moments_reference(h, weight, bias)
    assert_close(mean, exact_mean)
    scale = float(weight.double().square().sum(1).max())
    assert float((covariance.double() - exact).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_sketch(shape: tuple[int, int, int]) -> None:
    h, weight, bias = layer(*shape)
    rows = torch.arange(shape[0]) + 5
    lse = ops.softmax_lse(h, weight, bias)
    mean = ops.softmax_mean(h, weight, bias, lse)
    u, totals = ops.softmax_sketch(h, weight, bias, lse, mean, rows, 3, 9)
    exact_u, exact_totals = softmax_sketch_reference(h, weight, bias, rows, 3, 9)
    assert_close(totals, exact_totals, 3)
    assert float((u.double() - exact_u).abs().max()) <= 1e-5 * float(weight.abs().max()) * 5


def test_softmax_sketch_has_the_covariance_as_its_expectation() -> None:
    h, weight, bias = layer(1, 40, 3)
    repeats = 20000
    many, rows = h.expand(repeats, -1).double(), torch.arange(repeats)
    args = (many, weight.double(), bias.double())
    lse = ops.softmax_lse(*args)
    u, _ = ops.softmax_sketch(*args, lse, ops.softmax_mean(*args, lse), rows, 2, 0)
    samples = torch.einsum("nrd,nre->nde", u, u)
    error = samples.mean(0) - softmax_moments_reference(h, weight, bias)[1][0]
    assert (error.abs() < 5 * samples.std(0) / repeats**0.5).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampled", [False, True])
def test_head_sqgrad(shape: tuple[int, int, int], sampled: bool) -> None:
    h, weight, bias = layer(*shape)
    lse = ops.softmax_lse(h, weight, bias)
    ids = omega = None
    if sampled:
        g = torch.Generator().manual_seed(1)
        ids = torch.randint(0, shape[1], (shape[0], 6), generator=g)  # with repetitions
        omega = torch.rand(shape[0], 6, generator=g)
    start_w, start_b = torch.rand_like(weight), torch.rand_like(bias)
    found_w, found_b = start_w.clone(), start_b.clone()
    ops.head_sqgrad_(found_w, found_b, h, weight, bias, lse, ids, omega)
    exact_w, exact_b = head_sqgrad_reference(h, weight, bias, ids, omega)
    assert_close(found_w, start_w.double() + exact_w)
    assert_close(found_b, start_b.double() + exact_b)
    only_weight = start_w.clone()
    ops.head_sqgrad_(only_weight, None, h, weight, bias, lse, ids, omega)
    assert torch.equal(only_weight, found_w)


@pytest.mark.parametrize("n, t, o, i", [(1, 1, 1, 1), (5, 1, 7, 3), (3, 4, 7, 5), (9, 13, 31, 17)])
def test_segment_outer_square(
    n: int, t: int, o: int, i: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["fisherkern.ops.segment_outer_square"]
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 2 * o * i)
    g = torch.Generator().manual_seed(0)
    delta, inputs = torch.randn(n, t, o, generator=g), torch.randn(n, t, i, generator=g)
    start = torch.rand(o, i, generator=g)
    found = start.clone()
    ops.segment_outer_square_(found, delta, inputs)
    exact = segment_outer_square_reference(delta, inputs)
    assert_close(found, start.double() + exact)


def test_segment_outer_square_sums_before_squaring() -> None:
    """A literal table: two positions that cancel, and two sequences that do not."""
    delta = torch.tensor([[[1.0], [1.0]], [[2.0], [0.0]]])
    inputs = torch.tensor([[[3.0], [-3.0]], [[5.0], [7.0]]])
    found = torch.zeros(1, 1)
    ops.segment_outer_square_(found, delta, inputs)
    assert found.item() == 100.0


def calls() -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    h, weight, bias = layer(3, 300, 4)
    rows = torch.arange(3)
    lse = softmax_lse_reference(h, weight, bias).float()
    mean = softmax_moments_reference(h, weight, bias)[0].float()
    ids, omega = torch.tensor([[1, 2], [2, 2], [0, 299]]), torch.rand(3, 2)
    fisher = torch.ops.fisherkern
    lookups = ops.lookup_segments(torch.tensor([[0, 3], [2, 2], [-1, 3]]))
    return [
        ("softmax_lse", fisher.softmax_lse.default, (h, weight, bias)),
        ("softmax_topk", fisher.softmax_topk.default, (h, weight, bias, 5)),
        ("sample_items", fisher.sample_items.default, (h, weight, bias, lse, rows, 4, 1)),
        ("softmax_mean", fisher.softmax_mean.default, (h, weight, bias, lse)),
        ("softmax_covariance", fisher.softmax_covariance.default, (h, weight, bias, lse, mean)),
        ("softmax_sketch", fisher.softmax_sketch.default, (h, weight, None, lse, mean, rows, 2, 1)),
        (
            "head_sqgrad_",
            fisher.head_sqgrad_.default,
            (weight.clone(), bias.clone(), h, weight, bias, lse, ids, omega),
        ),
        (
            "segment_outer_square_",
            fisher.segment_outer_square_.default,
            (torch.zeros(4, 5), torch.randn(3, 6, 4), torch.randn(3, 6, 5)),
        ),
        (
            "lookup_square_",
            fisher.lookup_square_.default,
            (torch.zeros(4, 5), torch.randn(2, 6, 5), *lookups[:3], lookups[4])
            + (torch.randn(len(lookups.row), 2), torch.randn(3, 5), lookups.sequence),
        ),
    ]


@pytest.mark.parametrize("name, op, arguments", calls(), ids=[c[0] for c in calls()])
def test_opcheck(name: str, op: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, arguments, test_utils=checks)


@pytest.mark.parametrize("name, op, arguments", calls(), ids=[c[0] for c in calls()])
def test_compiles_whole(name: str, op: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """torch.compile without a graph break gives what eager gives, mutation included."""
    torch._dynamo.reset()  # all calls share one code object, which is recompiled 8 times at most
    eager = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected, found = op(*eager), compiled(*arguments)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(arguments, eager)


def test_counter_numbers_depend_on_position_alone() -> None:
    rows, columns = torch.arange(5), torch.arange(300)
    whole = counter.random_bits(3, rows, columns)
    part = counter.random_bits(3, rows[2:4], columns[100:200])
    assert torch.equal(whole[2:4, 100:200], part)
    assert not torch.equal(whole, counter.random_bits(4, rows, columns))
    assert torch.equal(counter.random_bits_at(3, rows, columns[:5]), whole[:, :5].diagonal())
    # splitmix64 of 0 after one step, from the reference implementation.
    assert int(counter._mix(torch.tensor([counter.GOLDEN]))[0]) == -2152535657050944081


def test_counter_numbers_look_random() -> None:
    u = counter.uniform(0, torch.arange(200), torch.arange(500))
    assert 0 <= float(u.min()) and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / u.numel()) ** 0.5
    counts = torch.histc(u, bins=20, min=0, max=1)
    expected = u.numel() / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 50  # chi², 19 degrees
    bits = counter.random_bits(0, torch.arange(200), torch.arange(500))
    signs = torch.stack([counter.signs(bits, r, torch.float64) for r in (0, 1, 31, 63)])
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    correlation = torch.corrcoef(signs.flatten(1)) - torch.eye(4, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / bits.numel() ** 0.5
