"""fp32 products on a CPU against float64, and where they are left to PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.ops import products
from fisherkern.ops.products import Linear, add_outer_, outer, product, suits

# P rows, O outputs, I inputs: one, primes, a side wider than the other, many rows, none.
SHAPES = [(1, 1, 1), (7, 13, 5), (5, 3, 11), (283, 1009, 64), (257, 64, 65), (0, 3, 4), (5, 3, 0)]


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a product is."""
    monkeypatch.setattr(products, "_LEAST", 0)
    monkeypatch.setattr(products, "_WIDE", 0)


def close(found: Tensor, exact: Tensor, plain: Tensor) -> None:
    """At most 3 times the error of PyTorch's own product, plus 1e-5 of the maximum."""
    assert found.shape == exact.shape and found.dtype == torch.float32
    if exact.numel():
        own, theirs = ((t.double() - exact).abs().max() for t in (found, plain))
        assert own <= 3 * theirs + 1e-5 * exact.abs().max()


def layouts(rows: int, columns: int) -> list[Tensor]:
    """Contiguous, transposed, with gaps."""
    g = torch.Generator().manual_seed(rows + 31 * columns)
    return [
        torch.randn(rows, columns, generator=g),
        torch.randn(columns, rows, generator=g).t(),
        torch.randn(rows, 2 * columns, generator=g)[:, ::2],
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int, int]) -> None:
    p, o, i = shape
    bias = torch.randn(o)
    for x, weight, delta in zip(layouts(p, i), layouts(o, i), layouts(p, o), strict=True):
        exact = x.double() @ weight.double().t()
        close(product(x, weight), exact, x @ weight.t())
        close(product(x, weight, bias), exact + bias, F.linear(x, weight, bias))
        exact = delta.double().t() @ x.double()
        close(outer(delta, x), exact, delta.t() @ x)
        total = torch.ones(o, i)
        add_outer_(total, delta, x)
        close(total, exact + 1, delta.t() @ x + 1)


@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 3), (1, 1), (2, 3, 4, 3)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_gradients(shape: tuple[int, ...], biased: bool) -> None:
    weight, bias = torch.randn(7, shape[-1]), torch.randn(7) if biased else None
    x, delta = torch.randn(shape), torch.randn(*shape[:-1], 7)
    given = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    found = torch.autograd.grad(Linear.apply(x, weight, bias), given, delta)
    wide = [t.detach().double().requires_grad_() for t in given]
    expected = torch.autograd.grad(F.linear(*wide), wide, delta.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float())


def test_only_the_gradients_asked_for() -> None:
    x, weight, bias = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)
    for wanted in (x, weight, bias):
        for tensor in (x, weight, bias):
            tensor.requires_grad_(tensor is wanted)
        Linear.apply(x, weight, bias).sum().backward()
        assert all((t.grad is None) == (t is not wanted) for t in (x, weight, bias))
        wanted.grad = None


def test_a_gradient_can_be_differentiated() -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True))

    def twice(function) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(function(x, weight, None).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), (x, weight))

    for found, expected in zip(twice(Linear.apply), twice(F.linear), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_result_may_be_overwritten() -> None:
    x, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4)
    assert Linear.apply(x, weight, None).add_(1).relu_().requires_grad


def test_what_is_left_to_pytorch() -> None:
    x = torch.randn(2, 3)
    assert suits(x, x)
    for other in (x.double(), x.bfloat16(), x.to("meta"), x[:0]):
        assert not suits(x, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits(x)
        assert product(x, x).dtype == torch.bfloat16


def test_small_products_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, onednn = [], products._by_onednn

    def seen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sizes.append((tuple(x.shape), tuple(weight.shape)))
        return onednn(x, weight, bias)

    monkeypatch.setattr(products, "_by_onednn", seen)
    monkeypatch.setattr(products, "_LEAST", 30)
    monkeypatch.setattr(products, "_WIDE", 4)
    x, weight = torch.randn(3, 2), torch.randn(5, 2)
    product(x[:2], weight)
    outer(x[:, :1], torch.randn(3, 4))
    outer(torch.randn(9, 3), torch.randn(9, 3))
    assert not sizes
    product(x, weight)
    outer(torch.randn(9, 4), torch.randn(9, 3))
    assert sizes == [((3, 2), (5, 2)), ((3, 9), (4, 9))]
