"""Layer normalisation's backward pass against autograd in float64, and the extension's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.extension import NO_EXTENSION, guarded
from torch import Tensor

from fisherkern import ops
from fisherkern.errors import InputError
from fisherkern.ops import _extension, build
from fisherkern.ops.backend import use_backend
from fisherkern.ops.layer_norm_backward import layer_norm_backward_reference

# R, P, D: one; primes; a vector, more and less; many rows; nothing.
SHAPES = [
    (1, 1, 1),
    (2, 3, 5),
    (3, 7, 13),
    (2, 3, 15),
    (5, 2, 16),
    (2, 5, 33),
    (7, 101, 64),
    (3, 11, 787),
    (0, 3, 4),
    (3, 0, 4),
    (2, 3, 0),
]
EPS = 0.1


def given(
    shape: tuple[int, ...], weighted: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """delta, normalised, weight, rstd, of rows far from each other in mean and size."""
    probes, rows, width = shape
    x = rows_of(shape)
    x -= x.mean(dim=1, keepdim=True)
    rstd = guarded(rows, dtype=dtype).copy_((x.square().mean(dim=1) + EPS).rsqrt())
    normalised = guarded(rows, width, dtype=dtype).copy_(x * rstd.double()[:, None])
    weight = guarded(width, seed=2, dtype=dtype) if weighted else None
    return guarded(probes, rows, width, seed=1, dtype=dtype), normalised, weight, rstd


def rows_of(shape: tuple[int, ...]) -> Tensor:
    _, rows, width = shape
    g = torch.Generator().manual_seed(3)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64)
    return x * torch.rand(rows, 1, generator=g).double().exp() + torch.arange(rows)[:, None]


def by_autograd(shape: tuple[int, ...], delta: Tensor, weight: Tensor | None) -> Tensor:
    """One row and probe after another, the normalisation written out."""
    found = torch.empty(shape, dtype=torch.float64)
    for p, row in enumerate(rows_of(shape)):
        x = row.clone().requires_grad_()
        centred = x - x.sum() / len(x)
        y = centred / (centred.square().sum() / len(x) + EPS).sqrt()
        y = y if weight is None else y * weight.double()
        for r in range(shape[0]):
            (found[r, p],) = torch.autograd.grad(y, x, delta[r, p].double(), retain_graph=True)
    return found


def error(found: Tensor, exact: Tensor, arguments: tuple[Tensor | None, ...]) -> float:
    """The largest, in units of the largest rstd g: the parts may cancel, at D = 1 altogether."""
    delta, _, weight, rstd = arguments
    assert found.shape == exact.shape and found.dtype == delta.dtype
    if not found.numel():
        return 0.0
    g = delta if weight is None else delta * weight
    return float((found - exact).abs().max() / (g * rstd[:, None]).abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_in_float64_and_the_twin(shape: tuple[int, ...], weighted: bool) -> None:
    delta, normalised, weight, rstd = given(shape, weighted, torch.float64)
    exact = by_autograd(shape, delta, weight)
    arguments = (delta, normalised, weight, rstd)
    assert error(ops.layer_norm_backward(*arguments), exact, arguments) < 1e-14
    assert error(layer_norm_backward_reference(*arguments), exact, arguments) < 1e-14


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_in_float32(shape: tuple[int, ...], weighted: bool) -> None:
    arguments = given(shape, weighted)
    exact = layer_norm_backward_reference(*arguments)
    found = ops.layer_norm_backward(*arguments)
    with use_backend("torch"):
        plain = ops.layer_norm_backward(*arguments)
    assert found.is_contiguous() and plain.is_contiguous()
    theirs = error(plain, exact, arguments)
    assert theirs < 1e-6
    assert error(found, exact, arguments) <= 3 * theirs + 1e-7


@pytest.fixture
def extension() -> Any:
    built = build.load_extension()
    if built is None:
        pytest.skip(NO_EXTENSION)
    return built


def run(extension: Any, shape: tuple[int, ...], threads: int = 1, lanes: int = 0) -> Tensor:
    """The extension's own, into memory with numbers that must not be added to."""
    tensors = given(shape, weighted=True)
    found = torch.full(shape, torch.nan)
    names = ("delta", "normalised", "weight", "rstd", "result")
    extension.layer_norm_backward_cpu(
        **{name: t.data_ptr() for name, t in zip(names, [*tensors, found], strict=True)},
        **dict(zip(("probes", "rows", "width"), shape, strict=True)),
        threads=threads,
        lanes=lanes,
    )
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_every_width(extension: Any, shape: tuple[int, ...], lanes: int) -> None:
    try:
        found = run(extension, shape, lanes=lanes)
    except ValueError as fault:
        pytest.skip(str(fault))
    arguments = given(shape, weighted=True)
    assert error(found, layer_norm_backward_reference(*arguments), arguments) < 1e-6


def test_bits_do_not_depend_on_threads(extension: Any) -> None:
    for shape in SHAPES:
        alone = run(extension, shape)
        for threads in (2, 3, 100):
            assert torch.equal(alone, run(extension, shape, threads))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_tensors_of_any_layout(backend: str) -> None:
    delta, normalised, weight, rstd = given((4, 7, 13), weighted=True)
    assert weight is not None
    turned = (
        delta.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        normalised.t().contiguous().t(),
        weight.repeat_interleave(2)[::2],
        rstd.repeat_interleave(3)[::3],
    )
    with use_backend(backend):
        plain = ops.layer_norm_backward(delta, normalised, weight, rstd)
        found = ops.layer_norm_backward(*turned)
    assert found.is_contiguous()
    torch.testing.assert_close(found, plain, rtol=0, atol=0 if backend == "auto" else 1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dim", [0, 2, -1])
@pytest.mark.parametrize("weighted", [True, False])
def test_mapped_over_output_gradients(dim: int, weighted: bool) -> None:
    """By torch.vmap, of calls with one probe and with several: the bits of call after call."""
    for probes, mapped in ((1, 7), (3, 2), (2, 1)):
        delta, *shared = given((probes * mapped, 5, 13), weighted)
        apart = delta.unflatten(0, (mapped, probes))
        call = torch.vmap(lambda d, shared=shared: ops.layer_norm_backward(d, *shared), dim)
        found = call(apart.movedim(0, dim))
        for r, one in enumerate(apart):
            assert torch.equal(found[r], ops.layer_norm_backward(one, *shared))


def test_mapped_over_anything_else() -> None:
    arguments = given((7, 7, 7), weighted=True)
    for dims in ((0, None, None, 0), (None, None, 0, None), (None, 0, 0, 0)):
        with pytest.raises(NotImplementedError, match="over delta alone"):
            torch.vmap(ops.layer_norm_backward, dims)(*arguments)


def test_bad_input(extension: Any) -> None:
    delta, normalised, weight, rstd = given((4, 7, 13), weighted=True)
    assert weight is not None
    for name, arguments in {
        "delta: must have 3 dimensions": (delta[0], normalised, weight, rstd),
        "normalised": (delta, normalised[1:], weight, rstd),
        "weight": (delta, normalised, weight[:1], rstd),
        "rstd": (delta, normalised, weight, rstd[:, None]),
        "fp32": (delta.double(), normalised, weight, rstd),
    }.items():
        with pytest.raises(InputError, match=name):
            _extension.layer_norm_backward(extension, *arguments)
    nowhere = dict.fromkeys(("delta", "normalised", "weight", "rstd", "result"), 0)
    for rows, said in ((-1, "rows must not be negative, got -1"), (1, "delta is a null address")):
        with pytest.raises(ValueError, match=said):
            extension.layer_norm_backward_cpu(**nowhere, probes=1, rows=rows, width=1)
