"""The backward pass of attention against autograd in float64: PyTorch's path, the extension."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_extension import NO_EXTENSION, guarded
from torch import Tensor

from fisherkern import ops
from fisherkern.errors import InputError
from fisherkern.ops import _extension
from fisherkern.ops._dispatch import use_backend
from fisherkern.ops.attention_backward import attention_backward_reference

# N, H, Q, T, d, e: one; primes; a vector more or less; tiles; fewer queries than keys; nothing.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (3, 2, 5, 7, 11, 3),
    (2, 3, 31, 33, 15, 17),
    (2, 1, 65, 63, 33, 31),
    (1, 4, 1, 50, 16, 64),
    (2, 2, 50, 50, 32, 32),
    (0, 2, 3, 3, 4, 4),
    (2, 2, 3, 3, 4, 0),
]
SCALE = 0.37


def given(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """p, delta, q, k, v; nobody attends to the first key, where there are others."""
    n, h, queries, keys, d, e = shape
    sizes = [(n, queries, h, e), (n, queries, h, d), (n, keys, h, d), (n, keys, h, e)]
    delta, q, k, v = (guarded(*s, seed=i, dtype=dtype) for i, s in enumerate(sizes))
    scores = SCALE * torch.einsum("nihd,njhd->nhij", q.double(), k.double())
    if keys > 1:
        scores[..., 0] = -torch.inf
    p = guarded(n, h, queries, keys, dtype=dtype)
    p.copy_(scores.softmax(dim=3))
    return [p, delta, q, k, v]


def by_autograd(p: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (tensor.double().requires_grad_() for tensor in (q, k, v))
    scores = SCALE * torch.einsum("nihd,njhd->nhij", q, k)
    hidden = torch.zeros_like(scores).masked_fill_(p == 0, -torch.inf)
    output = torch.einsum("nhij,njhe->nihe", (scores + hidden).softmax(dim=3), v)
    return torch.autograd.grad(output, (q, k, v), delta.double())


def assert_close(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], factor: float) -> None:
    for one, other in zip(found, exact, strict=True):
        assert one.shape == other.shape
        if one.numel():
            assert (one.double() - other).abs().max() <= factor * other.abs().max() + 1e-30


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_against_autograd(shape: tuple[int, ...], backend: str) -> None:
    arguments = given(shape)
    exact = by_autograd(*arguments)
    with use_backend(backend):
        found = ops.attention_backward(*arguments, SCALE)
    assert_close(found, exact, 1e-5)
    assert all(tensor.is_contiguous() for tensor in found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_float64_and_the_twin(shape: tuple[int, ...]) -> None:
    arguments = given(shape, torch.float64)
    exact = by_autograd(*arguments)
    assert_close(ops.attention_backward(*arguments, SCALE), exact, 1e-13)
    assert_close(attention_backward_reference(*arguments, SCALE), exact, 1e-13)


@pytest.fixture
def extension() -> Any:
    built = _extension.compiled()
    if built is None:
        pytest.skip(NO_EXTENSION)
    return built


def run(
    extension: Any, shape: tuple[int, ...], threads: int = 1, lanes: int = 0
) -> tuple[Tensor, ...]:
    """The extension's own, into memory with numbers that must not be added to."""
    p, delta, q, k, v = tensors = given(shape)
    found = [torch.full_like(tensor, torch.nan) for tensor in (q, k, v)]
    names = ("p", "delta", "q", "k", "v", "dq", "dk", "dv")
    sizes = ("sequences", "heads", "queries", "keys", "width", "value_width")
    extension.attention_backward_cpu(
        **{name: t.data_ptr() for name, t in zip(names, [*tensors, *found], strict=True)},
        **dict(zip(sizes, shape, strict=True)),
        scale=SCALE,
        threads=threads,
        lanes=lanes,
    )
    return tuple(found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_every_width(extension: Any, shape: tuple[int, ...], lanes: int) -> None:
    try:
        found = run(extension, shape, lanes=lanes)
    except ValueError as error:
        pytest.skip(str(error))
    assert_close(found, by_autograd(*given(shape)), 1e-5)


def test_bits_do_not_depend_on_threads(extension: Any) -> None:
    for shape in SHAPES:
        alone = run(extension, shape)
        for threads in (2, 3, 100):
            assert all(map(torch.equal, alone, run(extension, shape, threads)))


def test_tensors_of_any_layout() -> None:
    arguments = given((3, 2, 5, 7, 11, 3))
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in arguments]
    plain, found = (ops.attention_backward(*these, SCALE) for these in (arguments, turned))
    assert all(map(torch.equal, plain, found))


def test_bad_input(extension: Any) -> None:
    p, delta, q, k, v = given((3, 2, 5, 7, 11, 3))
    for name, arguments in {
        "delta": (p, delta[:, 1:], q, k, v),
        "q": (p, delta, q[:, :, :1], k, v),
        "k": (p, delta, q, k[..., :4], v),
        "v": (p, delta, q, k, v[:2]),
        "p": (p[0], delta, q, k, v),
        "fp32": (p, delta.double(), q, k, v),
    }.items():
        with pytest.raises(InputError, match=name):
            _extension.attention_backward(extension, *arguments, SCALE)
    for keys, said in ((-1, "keys must not be negative, got -1"), (1, "p is a null address")):
        sizes = dict.fromkeys(("sequences", "heads", "queries", "width", "value_width"), 1)
        nowhere = dict.fromkeys(("p", "delta", "q", "k", "v", "dq", "dk", "dv"), 0)
        with pytest.raises(ValueError, match=said):
            extension.attention_backward_cpu(**nowhere, **sizes, keys=keys, scale=1.0)
