"""Every Triton kernel against its float64 twin, in Triton's interpreter.

Not collected by name: test_triton.py runs this file in a process of its own with
TRITON_INTERPRET=1, because the interpreter is chosen when triton is imported.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import HISTORIES, bert
from torch import Tensor

import fisherkern as fk
from fisherkern import ops
from fisherkern.fisher.factors import samplers
from fisherkern.ops import sample_items_triton, segment_outer_square_triton, tiles_triton
from fisherkern.ops.backend import use_backend
from fisherkern.ops.head_sqgrad import head_sqgrad_reference
from fisherkern.ops.sample_distinct import sample_distinct_reference
from fisherkern.ops.sample_items import sample_items_reference
from fisherkern.ops.segment_outer_square import segment_outer_square_reference
from fisherkern.ops.softmax_lse import softmax_lse_reference
from fisherkern.ops.softmax_moments import range_lse_reference, softmax_moments_reference
from fisherkern.ops.softmax_sketch import softmax_sketch_reference
from fisherkern.ops.softmax_topk import MAX_TRITON_K, softmax_topk_reference

# (N, V, D): one of everything, primes, and the tiles' 64 rows, 64 or 128 items and 16,
# 32 or 64 columns with one beside them; then widths that are padded to 64, 112 and 208.
SHAPES = [(1, 1, 1), (3, 7, 5), (63, 129, 16), (64, 128, 64), (65, 127, 65), (5, 1031, 33)]
SHAPES += [(3, 65, 50), (2, 129, 100), (2, 63, 200)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels, outputs full of NaN, and few programs, so that each streams over tiles."""
    empty = torch.empty

    def poisoned(*size: int, **kwargs: object) -> Tensor:
        found = empty(*size, **kwargs)
        return found.fill_(torch.nan if found.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(tiles_triton, "TARGET_PROGRAMS", 2)
    assert tiles_triton.INTERPRETED
    with use_backend("triton"):
        yield


def walled(tensor: Tensor) -> Tensor:
    """The same tensor with NaN behind its end, which a load past the mask would read."""
    memory = torch.full((tensor.numel() + 300,), torch.nan, dtype=tensor.dtype)
    memory[: tensor.numel()] = tensor.flatten()
    return memory[: tensor.numel()].view(tensor.shape)


def layer(n: int, v: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n * v + d)
    shapes = ((n, d), (v, d), (v,))
    h, weight, bias = (torch.randn(*shape, generator=g).to(dtype) for shape in shapes)
    # Logits of unit variance, as a trained model's are within an order of magnitude.
    return walled(h / d**0.5), walled(weight), walled(bias)


def assert_close(found: Tensor, exact: Tensor, factor: float = 1.0) -> None:
    """Error at most `factor` × 1e-5 of the largest entry."""
    assert found.shape == exact.shape and found.dtype == torch.float32
    error = float((found.double() - exact).abs().max())
    assert error <= factor * 1e-5 * max(float(exact.abs().max()), 1e-30), error


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_lse(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, weight, bias = layer(*shape, dtype)
    for b in (bias, None):
        assert_close(ops.softmax_lse(h, weight, b), softmax_lse_reference(h, weight, b))


def test_softmax_lse_of_mixed_dtypes_and_strides() -> None:
    h, weight, bias = layer(6, 40, 10)
    half = weight.bfloat16()
    assert_close(ops.softmax_lse(h, half, bias), softmax_lse_reference(h, half, bias))
    turned = h.T.contiguous().T
    assert_close(ops.softmax_lse(turned, weight, None), softmax_lse_reference(h, weight, None))


def test_softmax_lse_with_impossible_items() -> None:
    """A bias of −inf, in a whole tile and everywhere."""
    h, weight, bias = layer(3, 300, 4)
    bias[:200] = -torch.inf
    assert_close(ops.softmax_lse(h, weight, bias), softmax_lse_reference(h, weight, bias))
    bias[:] = -torch.inf
    assert (ops.softmax_lse(h, weight, bias) == -torch.inf).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_topk(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, weight, bias = layer(*shape, dtype)
    k = min(shape[1], 20)
    p, ids, lse, mean = ops.softmax_topk(h, weight, bias, k)
    exact_p, exact_ids, exact_lse = softmax_topk_reference(h, weight, bias, k)
    assert torch.equal(ids, exact_ids)
    assert_close(p, exact_p)
    assert_close(lse, exact_lse)
    assert_close(mean, softmax_moments_reference(h, weight, bias)[0])


@pytest.mark.parametrize("k", [1, 2, 16, 17, MAX_TRITON_K, MAX_TRITON_K + 1])
def test_softmax_topk_gives_ties_to_the_lower_id(k: int) -> None:
    """Small integers, so that products are exact and ties are ties in every precision."""
    g = torch.Generator().manual_seed(0)
    h = torch.randint(-2, 3, (6, 3), generator=g).float()
    weight = torch.randint(-2, 3, (300, 3), generator=g).float()
    _, ids, _, _ = ops.softmax_topk(h, weight, None, k)
    assert torch.equal(ids, softmax_topk_reference(h, weight, None, k)[1])


def test_softmax_topk_with_fewer_possible_items_than_k() -> None:
    h, weight, bias = layer(3, 200, 4)
    bias[:196] = -torch.inf
    p, ids, _, _ = ops.softmax_topk(h, weight, bias, 6)
    assert torch.equal(ids, softmax_topk_reference(h, weight, bias, 6)[1])
    assert ids[:, 4:].tolist() == [[0, 1]] * 3 and (p[:, 4:] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampled", [False, True])
def test_head_sqgrad(shape: tuple[int, int, int], dtype: torch.dtype, sampled: bool) -> None:
    h, weight, bias = layer(*shape, dtype)
    lse = softmax_lse_reference(h, weight, bias).float()
    ids = omega = None
    if sampled:
        g = torch.Generator().manual_seed(1)
        ids = torch.randint(0, shape[1], (shape[0], 3), generator=g)
        ids[:, 1] = shape[1] // 2  # a run of many occurrences
        omega = torch.rand(shape[0], 3, generator=g)
    start_w, start_b = torch.rand(weight.shape), torch.rand(bias.shape)
    found_w, found_b = start_w.clone(), start_b.clone()
    ops.head_sqgrad_(found_w, found_b, h, weight, bias, lse, ids, omega)
    exact_w, exact_b = head_sqgrad_reference(h, weight, bias, ids, omega)
    assert_close(found_w, start_w.double() + exact_w)
    assert_close(found_b, start_b.double() + exact_b)


@pytest.mark.parametrize("sampled", [False, True])
def test_head_sqgrad_of_one_fisher_without_a_bias(sampled: bool) -> None:
    h, weight, _ = layer(4, 70, 6)
    lse = softmax_lse_reference(h, weight).float()
    ids = torch.tensor([[69, 0]]).expand(4, 2) if sampled else None
    omega = torch.tensor([[0.5, 2.0]]).expand(4, 2) if sampled else None
    exact_w, exact_b = head_sqgrad_reference(h, weight, None, ids, omega)
    turned = torch.zeros(6, 70).T  # not contiguous
    ops.head_sqgrad_(turned, None, h, weight, None, lse, ids, omega)
    assert_close(turned, exact_w)
    only_bias = torch.zeros(70)
    ops.head_sqgrad_(None, only_bias, h, weight, None, lse, ids, omega)
    assert_close(only_bias, exact_b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_mean(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, weight, bias = layer(*shape, dtype)
    for b in (bias, None):
        lse, mean, ranges = ops.softmax_mean(h, weight, b)
        assert_close(lse, softmax_lse_reference(h, weight, b))
        assert_close(mean, softmax_moments_reference(h, weight, b)[0])
        exact = range_lse_reference(h, weight, b)
        assert ranges.dtype == torch.float64 and ranges.shape == exact.shape
        assert_close(ranges.float(), exact)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (2, 7, 5), (3, 65, 16), (2, 64, 64), (2, 131, 65), (2, 63, 50), (1, 65, 200)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_covariance(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, weight, bias = layer(*shape, dtype)
    for b in (bias, None):
        lse = softmax_lse_reference(h, weight, b).float()
        mean, exact = softmax_moments_reference(h, weight, b)
        found = ops.softmax_covariance(h, weight, b, lse, walled(mean.float()))
        assert torch.equal(found, found.transpose(1, 2))
        error = float((found.double() - exact).abs().max())
        assert error <= 1e-5 * float(weight.double().square().sum(1).max())


@pytest.mark.parametrize(
    "shape, probes",
    [((1, 1, 1), 1), ((3, 7, 5), 3), ((15, 33, 16), 8), ((17, 31, 65), 9), ((3, 90, 4), 64)]
    + [((2, 65, 50), 2), ((2, 33, 100), 3)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_sketch(shape: tuple[int, int, int], probes: int, dtype: torch.dtype) -> None:
    """Signs that differed in one place would be an error of the order of the sum itself."""
    h, weight, bias = layer(*shape, dtype)
    rows = torch.arange(shape[0]) * 13 + 5  # several words of signs
    for b in (bias, None):
        lse = softmax_lse_reference(h, weight, b).float()
        mean = softmax_moments_reference(h, weight, b)[0].float()
        u, totals = ops.softmax_sketch(h, weight, b, lse, mean, rows, probes, -9)
        exact_u, exact_totals = softmax_sketch_reference(h, weight, b, rows, probes, -9)
        assert_close(totals, exact_totals, 3)
        assert u.shape == exact_u.shape
        error = float((u.double() - exact_u).abs().max())
        assert error <= 1e-5 * float(weight.double().abs().max()) * 5


SAMPLED = [
    (1, 1, 1),
    (3, 7, 5),
    (65, 127, 16),
    (2, 257, 65),
    (2, 600, 4),
    (2, 255, 50),
    (2, 513, 200),
]


def drawn_from(h: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    rows = torch.arange(len(h)) * 2 + 10
    lse = softmax_lse_reference(h, weight, bias).float()
    return h, weight, bias, lse, range_lse_reference(h, weight, bias), rows


@pytest.mark.parametrize("shape", SAMPLED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_items(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The twin's draws, from ranges of two tiles of items."""
    h, weight, bias = layer(*shape, dtype)
    k = 1 if shape[0] > 10 else 7
    given = drawn_from(h, weight, None if dtype == torch.float16 else bias)
    found = ops.sample_items(*given, k, 3)
    # Equal, though a draw within rounding of a step could fall on its other side: none does.
    assert torch.equal(found, sample_items_reference(*given[:3], given[5], k, 3))


def test_sample_items_beyond_the_last_step() -> None:
    """An lse too high leaves mass over: draws above it are the last item, not one beyond."""
    h, weight, bias, lse, ranges, rows = drawn_from(*layer(2, 258, 3))
    found = ops.sample_items(h, weight, bias, lse + 20, ranges, rows, 4, 0)
    assert (found == 257).all()


@pytest.mark.parametrize("shape", SAMPLED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_distinct(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, weight, bias = layer(*shape, dtype)
    given = drawn_from(h, weight, None if dtype == torch.float16 else bias)
    for k in {1, min(4, shape[1]), min(shape[1], 7)}:
        ids, omega = ops.sample_distinct(*given, k, 3)
        exact_ids, exact_omega = sample_distinct_reference(*given[:3], given[5], k, 3)
        assert torch.equal(ids, exact_ids)
        torch.testing.assert_close(omega.double(), exact_omega, rtol=1e-4, atol=1e-9)


def test_sample_items_adds_up_more_ranges_than_a_tile() -> None:
    mass = torch.rand(2, 1100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = mass.cumsum(dim=1)
    sample_items_triton.sample_items_total_kernel[2,](mass, 1100, ITEMS=512)
    torch.testing.assert_close(mass, exact)


@pytest.mark.parametrize(
    "r, n, t, o, i",
    [(1, 1, 2, 1, 1), (2, 3, 1, 7, 5), (3, 3, 4, 7, 5), (1, 7, 31, 64, 65), (2, 3, 65, 63, 64)]
    + [(1, 2, 64, 65, 17), (2, 2, 50, 50, 100)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_segment_outer_square(
    r: int, n: int, t: int, o: int, i: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_outer_square_triton, "TARGET_PROGRAMS", 4)
    g = torch.Generator().manual_seed(0)
    delta, inputs = torch.randn(r, n, t, o, generator=g), torch.randn(n, t, i, generator=g)
    delta, inputs = walled(delta.to(dtype)), walled(inputs.to(dtype))
    start = torch.rand(o, i, generator=g)
    found = start.clone()
    ops.segment_outer_square_(found, delta, inputs)
    assert_close(found, start.double() + segment_outer_square_reference(delta, inputs))
    turned = torch.zeros(i, o).T
    ops.segment_outer_square_(turned, delta.expand(r, n, t, o), inputs)
    assert_close(turned, segment_outer_square_reference(delta, inputs))


@pytest.mark.parametrize(
    "arguments",
    [
        {"sampler": "exact"},
        {"sampler": "sketch", "probes": 4},
        {"sampler": "topk", "k": 4},
        {"sampler": "model", "k": 8},
        {"sampler": "model", "k": 3, "replacement": False},
    ],
    ids=["exact", "sketch", "topk", "model", "distinct"],
)
def test_diag_fisher_is_that_of_pytorch(
    arguments: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "_COVARIANCE_LIMIT", 0)  # sketch over the items themselves
    model = bert().float()
    found, expected = (
        fk.diag_fisher(model, [HISTORIES], seed=1, backend=name, progress=False, **arguments)
        for name in ("triton", "torch")
    )
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        error = float((found[name] - tensor).abs().max())
        assert error <= 1e-4 * float(tensor.max()) + 1e-12, (name, error)
