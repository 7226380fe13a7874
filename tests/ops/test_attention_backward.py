"""The backward pass of attention against autograd in float64: PyTorch's path, the extension."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.extension import NO_EXTENSION, guarded
from torch import Tensor

from fisherkern import ops
from fisherkern.errors import InputError
from fisherkern.ops import _extension, build
from fisherkern.ops.attention_backward import attention_backward_reference
from fisherkern.ops.backend import use_backend

# R, N, H, Q, T, d, e: one; primes; a vector more or less; tiles; fewer queries than keys, of more
# probes than are stacked and of fewer; panels of every width, in both; nothing.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 2, 5, 7, 11, 3),
    (3, 2, 3, 31, 33, 15, 17),
    (2, 2, 1, 65, 63, 33, 31),
    (5, 1, 4, 1, 50, 16, 64),
    (67, 2, 2, 1, 44, 5, 3),
    (13, 2, 1, 6, 5, 80, 97),
    (2, 2, 2, 50, 50, 32, 32),
    (0, 2, 2, 3, 3, 4, 4),
    (3, 0, 2, 3, 3, 4, 4),
    (3, 2, 2, 3, 3, 4, 0),
    (3, 2, 2, 0, 3, 4, 2),
    (3, 2, 2, 3, 0, 4, 2),
]
SCALE = 0.37


def given(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """p, delta, q, k, v; nobody attends to the first key, where there are others."""
    r, n, h, queries, keys, d, e = shape
    sizes = [(r, n, queries, h, e), (n, queries, h, d), (n, keys, h, d), (n, keys, h, e)]
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
    found = [
        torch.autograd.grad(output, (q, k, v), one, retain_graph=True) for one in delta.double()
    ]
    if not found:
        return tuple(tensor.new_empty(0, *tensor.shape) for tensor in (q, k, v))
    return tuple(torch.stack(each) for each in zip(*found, strict=True))


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
    built = build.load_extension()
    if built is None:
        pytest.skip(NO_EXTENSION)
    return built


def run(
    extension: Any, shape: tuple[int, ...], threads: int = 1, lanes: int = 0
) -> tuple[Tensor, ...]:
    """The extension's own, into memory with numbers that must not be added to."""
    p, delta, q, k, v = tensors = given(shape)
    found = [torch.full((len(delta), *tensor.shape), torch.nan) for tensor in (q, k, v)]
    names = ("p", "delta", "q", "k", "v", "dq", "dk", "dv")
    sizes = ("probes", "sequences", "heads", "queries", "keys", "width", "value_width")
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
    arguments = given((4, 3, 2, 5, 7, 11, 3))
    turned = [t.transpose(-3, -2).contiguous().transpose(-3, -2) for t in arguments]
    plain, found = (ops.attention_backward(*these, SCALE) for these in (arguments, turned))
    assert all(map(torch.equal, plain, found))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dim", [0, 2, -1])
def test_mapped_over_output_gradients(dim: int) -> None:
    """By torch.vmap, of calls with one probe and with several: the bits of call after call."""
    for probes, mapped in ((1, 7), (3, 2), (2, 1)):
        p, delta, q, k, v = given((probes * mapped, 3, 2, 5, 7, 11, 3))
        apart = delta.unflatten(0, (mapped, probes))
        call = torch.vmap(
            lambda d, p=p, q=q, k=k, v=v: ops.attention_backward(p, d, q, k, v, SCALE), dim
        )
        found = call(apart.movedim(0, dim))
        for r, one in enumerate(apart):
            alone = ops.attention_backward(p, one, q, k, v, SCALE)
            assert all(torch.equal(many[r], few) for many, few in zip(found, alone, strict=True))


def test_mapped_over_anything_else() -> None:
    p, delta, q, k, v = given((4, 3, 2, 5, 7, 11, 3))
    for dims in ((0, None, None, None, None), (None, None, 0, None, None), (0, 1, 0, 0, 0)):
        with pytest.raises(NotImplementedError, match="over delta alone"):
            torch.vmap(lambda *t: ops.attention_backward(*t, SCALE), dims)(p, delta, q, k, v)


def test_bad_input(extension: Any) -> None:
    p, delta, q, k, v = given((4, 3, 2, 5, 7, 11, 3))
    for name, arguments in {
        "delta": (p, delta[:, :, 1:], q, k, v),
        "delta: must have 5 dimensions": (p, delta[0], q, k, v),
        "q": (p, delta, q[:, :, :1], k, v),
        "k": (p, delta, q, k[..., :4], v),
        "v": (p, delta, q, k, v[:2]),
        "p": (p[0], delta, q, k, v),
        "fp32": (p, delta.double(), q, k, v),
    }.items():
        with pytest.raises(InputError, match=name):
            _extension.attention_backward(extension, *arguments, SCALE)
    for keys, said in ((-1, "keys must not be negative, got -1"), (1, "p is a null address")):
        sizes = dict.fromkeys(
            ("probes", "sequences", "heads", "queries", "width", "value_width"), 1
        )
        nowhere = dict.fromkeys(("p", "delta", "q", "k", "v", "dq", "dk", "dv"), 0)
        with pytest.raises(ValueError, match=said):
            extension.attention_backward_cpu(**nowhere, **sizes, keys=keys, scale=1.0)
