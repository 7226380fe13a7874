"""Every op against its float64 twin where tiles end, and under torch.library's checks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fisherkern import ops
from fisherkern.errors import InputError
from fisherkern.ops.backend import use_backend
from fisherkern.ops.head_sqgrad import head_sqgrad_reference
from fisherkern.ops.segment_outer_square import segment_outer_square_reference
from fisherkern.ops.softmax_lse import softmax_lse_reference
from fisherkern.ops.softmax_moments import range_lse_reference, softmax_moments_reference
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
    p, ids, lse, mean = ops.softmax_topk(h, weight, bias, k)
    exact_p, exact_ids, exact_lse = softmax_topk_reference(h, weight, bias, k)
    assert torch.equal(ids, exact_ids)
    assert_close(p, exact_p)
    assert_close(lse, exact_lse)
    assert_close(mean, softmax_moments_reference(h, weight, bias)[0])


def test_softmax_topk_gives_ties_to_the_lower_id() -> None:
    """Small integers, so that products are exact and ties are ties in every precision."""
    g = torch.Generator().manual_seed(0)
    h = torch.randint(-2, 3, (6, 3), generator=g).float()
    weight = torch.randint(-2, 3, (600, 3), generator=g).float()
    for k in (1, 5, 128, 600):
        _, ids, _, _ = ops.softmax_topk(h, weight, None, k)
        assert torch.equal(ids, softmax_topk_reference(h, weight, None, k)[1])


@pytest.mark.parametrize("rising", [False, True])
def test_softmax_topk_of_ordered_items(rising: bool) -> None:
    """Every tile full of candidates, and none after the first."""
    weight = torch.linspace(-3, 3, 1500)[:, None]
    weight = weight if rising else weight.flip(0)
    h = torch.tensor([[1.0], [50.0], [0.5]])
    p, ids, lse, mean = ops.softmax_topk(h, weight, None, 300)
    exact_p, exact_ids, exact_lse = softmax_topk_reference(h, weight, None, 300)
    assert torch.equal(ids, exact_ids)
    # Logits up to 150 in fp32: their exponentials are good to 150 × 6e-8.
    assert_close(p, exact_p, 5)
    assert_close(lse, exact_lse)
    assert_close(mean, softmax_moments_reference(h, weight, None)[0])


def test_softmax_topk_with_impossible_items() -> None:
    """A bias of −inf for whole tiles, and for all items but three."""
    h, weight, bias = layer(4, 900, 3)
    bias[:600] = -torch.inf
    bias[603:] = -torch.inf
    p, ids, lse, mean = ops.softmax_topk(h, weight, bias, 5)
    assert torch.equal(ids, softmax_topk_reference(h, weight, bias, 5)[1])
    assert_close(lse, softmax_lse_reference(h, weight, bias))
    assert_close(mean, softmax_moments_reference(h, weight, bias)[0])
    assert (p[:, 3:] == 0).all()


def test_softmax_topk_of_a_row_that_is_not_a_number() -> None:
    """The other rows are right, and its own ids can be looked up."""
    h, weight, bias = layer(4, 900, 3)
    h[2] = torch.nan
    p, ids, _, _ = ops.softmax_topk(h, weight, bias, 5)
    rest = [0, 1, 3]
    assert torch.equal(ids[rest], softmax_topk_reference(h[rest], weight, bias, 5)[1])
    assert p[2].isnan().all() and (ids >= 0).all() and (ids < 900).all()
    weight[3] = torch.nan  # one item, in every row
    p, ids, _, _ = ops.softmax_topk(h, weight, bias, 5)
    assert p.isnan().all() and (ids >= 0).all() and (ids < 900).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_moments(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, weight, bias = layer(*shape, dtype)
    lse, mean, ranges = ops.softmax_mean(h, weight, bias)
    covariance = ops.softmax_covariance(h, weight, bias, lse, mean)
    exact_mean, exact = softmax_moments_reference(h, weight, bias)
    assert_close(lse, softmax_lse_reference(h, weight, bias))
    assert_close(mean, exact_mean)
    assert ranges.dtype == torch.float64
    assert_close(ranges, range_lse_reference(h, weight, bias))
    scale = float(weight.double().square().sum(1).max())
    assert float((covariance.double() - exact).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("probes", [1, 3, 64])
def test_softmax_sketch(shape: tuple[int, int, int], probes: int) -> None:
    h, weight, bias = layer(*shape)
    rows = torch.arange(shape[0]) * 13 + 5  # several words of signs
    lse, mean, _ = ops.softmax_mean(h, weight, bias)
    u, totals = ops.softmax_sketch(h, weight, bias, lse, mean, rows, probes, 9)
    exact_u, exact_totals = softmax_sketch_reference(h, weight, bias, rows, probes, 9)
    assert_close(totals, exact_totals, 3)
    assert float((u.double() - exact_u).abs().max()) <= 1e-5 * float(weight.abs().max()) * 5


def test_softmax_sketch_has_the_covariance_as_its_expectation() -> None:
    h, weight, bias = layer(1, 40, 3)
    repeats = 20000
    many, rows = h.expand(repeats, -1).double(), torch.arange(repeats)
    args = (many, weight.double(), bias.double())
    lse, mean, _ = ops.softmax_mean(*args)
    u, _ = ops.softmax_sketch(*args, lse, mean, rows, 2, 0)
    samples = torch.einsum("nrd,nre->nde", u, u)
    error = samples.mean(0) - softmax_moments_reference(h, weight, bias)[1][0]
    assert (error.abs() < 5 * samples.std(0) / repeats**0.5).all()


def test_softmax_sketch_error_falls_with_rows_times_probes() -> None:
    """The mean over rows of u uᵀ misses C by about 1/sqrt(N R), as dense signs would.

    trace(E[(Σ u uᵀ − C)²]) is at most (trace(C)² + trace(C²)) / (N R): the literal
    variance of R dense sign vectors, less the part of v = v'.
    """
    h, weight, bias = (t.double() for t in layer(1, 500, 6))
    exact = softmax_moments_reference(h, weight, bias)[1][0]
    bound = exact.trace() ** 2 + exact.square().sum()
    for n, probes in ((64, 1), (64, 16), (1024, 1), (1024, 16)):
        many, rows = h.expand(n, -1), torch.arange(n)
        lse, mean, _ = ops.softmax_mean(many, weight, bias)
        errors = []
        for seed in range(30):
            u, _ = ops.softmax_sketch(many, weight, bias, lse, mean, rows, probes, seed)
            errors.append((torch.einsum("nrd,nre->de", u, u) / n - exact).square().sum())
        found = float(torch.stack(errors).mean() * n * probes / bound)
        assert 0.5 < found < 1.4, (n, probes, found)


def test_softmax_sketch_with_a_probe_for_every_item_is_exact() -> None:
    h, weight, bias = (t.double() for t in layer(3, 40, 5))
    lse, mean, _ = ops.softmax_mean(h, weight, bias)
    for probes in (40, 50):
        u, _ = ops.softmax_sketch(h, weight, bias, lse, mean, torch.arange(3), probes, 1)
        exact = softmax_moments_reference(h, weight, bias)[1]
        torch.testing.assert_close(torch.einsum("nrd,nre->nde", u, u), exact)


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
    # Away from zero: where p = 1 the parts cancel, and the start is all that is left.
    start_w, start_b = weight.square() + 1, bias.square() + 1
    found_w, found_b = start_w.clone(), start_b.clone()
    ops.head_sqgrad_(found_w, found_b, h, weight, bias, lse, ids, omega)
    exact_w, exact_b = head_sqgrad_reference(h, weight, bias, ids, omega)
    assert_close(found_w, start_w.double() + exact_w)
    assert_close(found_b, start_b.double() + exact_b)
    only_weight = start_w.clone()
    ops.head_sqgrad_(only_weight, None, h, weight, bias, lse, ids, omega)
    assert torch.equal(only_weight, found_w)


# (R, N, T, O, I): one of everything; T = 1; primes; PyTorch's Gram form where 3 T (R + I) < R I,
# one position less, that many and one more; nothing to sum.
OUTER_SQUARES = [(1, 1, 1, 1, 1), (3, 5, 1, 7, 3), (1, 3, 4, 7, 5), (2, 9, 13, 31, 17)]
OUTER_SQUARES += [(24, 5, t, 7, 24) for t in (3, 4, 5)] + [(31, 7, 2, 5, 13), (64, 3, 5, 24, 64)]
OUTER_SQUARES += [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (30, 2, 0, 4, 30), (2, 2, 3, 0, 5)]


def brute_outer_square(delta: Tensor, inputs: Tensor) -> Tensor:
    return torch.einsum("rnto,nti->rnoi", delta.double(), inputs.double()).square().sum(dim=(0, 1))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("tiles", [1, 2**20])
@pytest.mark.parametrize("shape", OUTER_SQUARES, ids=str)
def test_segment_outer_square(
    shape: tuple[int, ...], tiles: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    r, n, t, o, i = shape
    module = sys.modules["fisherkern.ops.segment_outer_square"]
    monkeypatch.setattr(module, "_TILE_ELEMENTS", tiles)
    g = torch.Generator().manual_seed(0)
    delta, inputs = torch.randn(r, n, t, o, generator=g), torch.randn(n, t, i, generator=g)
    start = torch.rand(o, i, generator=g)
    found, turned = start.clone(), torch.zeros(i, o).T.copy_(start)
    with use_backend(backend):
        ops.segment_outer_square_(found, delta, inputs)
        ops.segment_outer_square_(turned, delta, inputs)
    exact = start.double() + brute_outer_square(delta, inputs)
    if exact.numel():
        assert_close(found, exact)
        assert_close(turned, exact)
        assert_close(start.double() + segment_outer_square_reference(delta, inputs), exact)


def test_the_shapes_alone_choose_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    module, taken = sys.modules["fisherkern.ops.segment_outer_square"], []
    for name in ("_add_direct_", "_add_gram_"):
        monkeypatch.setattr(module, name, lambda *_, name=name: taken.append(name))
    with use_backend("torch"):
        for t in (3, 4, 5):
            ops.segment_outer_square_(
                torch.zeros(7, 24), torch.ones(24, 1, t, 7), torch.zeros(1, t, 24)
            )
    assert taken == ["_add_gram_", "_add_direct_", "_add_direct_"]


def test_segment_outer_square_sums_before_squaring() -> None:
    """A literal table: two positions that cancel, two sequences and two probes that do not."""
    delta = torch.tensor([[[[1.0], [1.0]], [[2.0], [0.0]]], [[[0.0], [0.0]], [[0.0], [3.0]]]])
    inputs = torch.tensor([[[3.0], [-3.0]], [[5.0], [7.0]]])
    found = torch.zeros(1, 1)
    ops.segment_outer_square_(found, delta, inputs)
    assert found.item() == 100.0 + 441.0


@pytest.mark.parametrize("shapes", [((3, 2, 4), (3, 2, 5)), ((1, 3, 2, 4), (3, 1, 5)),
                                    ((1, 3, 2, 5), (3, 2, 4)), ((1, 3, 2, 4), (2, 5))])  # fmt: skip
def test_segment_outer_square_names_wrong_tensors(shapes: tuple[tuple[int, ...], ...]) -> None:
    delta, inputs = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(InputError, match=r"^delta \(.* are not \(R, N, T, O\) and"):
        ops.segment_outer_square_(torch.zeros(4, 5), delta, inputs)


def calls() -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    h, weight, bias = layer(3, 300, 4)
    rows = torch.arange(3)
    lse = softmax_lse_reference(h, weight, bias).float()
    ranges = range_lse_reference(h, weight, bias)
    mean = softmax_moments_reference(h, weight, bias)[0].float()
    ids, omega = torch.tensor([[1, 2], [2, 2], [0, 299]]), torch.rand(3, 2)
    drawn = (h, weight, bias, lse, ranges, rows)
    fisher = torch.ops.fisherkern
    lookups = ops.lookup_segments(torch.tensor([[0, 3], [2, 2], [-1, 3]]))
    q, delta = torch.randn(2, 3, 4, 5), torch.randn(6, 2, 3, 4, 5)
    p = torch.randn(2, 4, 3, 3).softmax(dim=3)
    return [
        ("attention_backward", fisher.attention_backward.default, (p, delta, q, q, q, 0.5)),
        (
            "layer_norm_backward",
            fisher.layer_norm_backward.default,
            (torch.randn(6, 3, 4), h, torch.rand(4), torch.rand(3)),
        ),
        ("softmax_lse", fisher.softmax_lse.default, (h, weight, bias)),
        ("softmax_topk", fisher.softmax_topk.default, (h, weight, bias, 5)),
        ("sample_items", fisher.sample_items.default, (*drawn, 4, 1)),
        ("sample_distinct", fisher.sample_distinct.default, (*drawn, 4, 1)),
        ("softmax_mean", fisher.softmax_mean.default, (h, weight, bias)),
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
            (torch.zeros(4, 5), torch.randn(2, 3, 6, 4), torch.randn(3, 6, 5)),
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
