"""Matrix products in fp32 on a CPU, by the faster of the two libraries that PyTorch holds.

PyTorch hands them to MKL, whose AVX-512 kernels are for Intel's processors alone; oneDNN, in the
same PyTorch, has them for all: on one thread of an AMD EPYC, at D = 64, `product` takes 40 to 50 %
of the time and `outer` 50 to 60 %. On Intel's the two are alike.

oneDNN makes code for every shape, and keeps about half a megabyte each for up to a thousand: where
numbers of rows come from data, ask for few different ones (`rows_for_onednn`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.ops.active_rows import active_rows
from fisherkern.ops.backend import on_gpu
from fisherkern.ops.library import register_op

# The operator is PyTorch's own but not public; where it is missing MKL serves.
_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def suits(*factors: Tensor) -> bool:
    """Whether oneDNN may multiply these: fp32 on a CPU, not empty, no cast pending, eager."""
    return (
        _AVAILABLE
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in factors)
        and not on_gpu(factors[0])
        and all(t.numel() for t in factors)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def suits_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN may stand for F.linear here, with autograd recording."""
    given = [weight] if bias is None else [weight, bias]
    matrices = input.dim() > 1 and weight.dim() == 2
    return torch.is_grad_enabled() and matrices and suits(input, *given)


def rows_for_onednn(rows: int) -> bool:
    """Whether so many rows may well come again: a rule by the shape alone, so that runs repeat."""
    return rows % 8 == 0


# Multiply-adds from which oneDNN's start is worth it, and the wider side from which its sum over P
# is: below both MKL is faster on an AMD EPYC too.
_LEAST = 1 << 21
_WIDE = 256


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: (P, I), (O, I), (O,) -> (P, O). Not differentiable, as oneDNN's is not."""
    if x.shape[0] * weight.numel() < _LEAST or not suits(x, weight):
        return F.linear(x, weight, bias)
    return _by_onednn(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Of a matrix with gaps oneDNN takes each number by itself, a hundred times as long.
    x, weight = (
        t if t.is_contiguous() or t.t().is_contiguous() else t.contiguous() for t in (x, weight)
    )
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


@register_op(lambda x, weight: x.new_empty(*x.shape[:-1], len(weight)), vmap_arg="x")
def rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of all rows: (R, ..., I), (O, I) -> (R, ..., O), as `product`.

    torch.vmap over x is more of R in one call. Rows of zeros cost a look.
    """
    by_row = x.reshape(len(x), -1, x.shape[-1])
    rows = active_rows(by_row)
    if rows is None:
        result = product(by_row.flatten(0, 1), weight)
    else:
        result = x.new_zeros(*by_row.shape[:2], len(weight))
        active = product(by_row[:, rows].flatten(0, 1), weight)
        result[:, rows] = active.view(len(x), len(rows), len(weight))
    return result.view(*x.shape[:-1], len(weight))


def outer(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right, the sum over P of outer products: (P, O), (P, I) -> (O, I), as `product`."""
    wide, rows = max(left.shape[1], right.shape[1]), left.shape[0]
    few = rows * left.shape[1] * right.shape[1] < _LEAST
    if few or wide < _WIDE or not suits(left, right):
        return left.t() @ right
    # oneDNN is fast where the factor that it takes for the weight is the wider one.
    if left.shape[1] <= right.shape[1]:
        return _by_onednn(left.t(), right.t(), None)
    return _by_onednn(right.t(), left.t(), None).t()


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, in total's type: (P, O) += (P, I), (I, O)."""
    if suits(left, right):
        total += product(left, right.t())
    elif total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def add_outer_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ right, in total's type: (O, I) += (P, O), (P, I)."""
    if suits(left, right):
        total += outer(left, right)
    else:
        add_product_(total, left.t(), right)


class Linear(torch.autograd.Function):
    """x Wᵀ + b over the last axis of x, with the three products of its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        flat = product(x.reshape(-1, x.shape[-1]), weight, bias)
        # Not a view of anything, so that the model may overwrite it.
        result: Tensor = torch.ops.aten._unsafe_view(flat, [*x.shape[:-1], weight.shape[0]])
        return result

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = deltas[0].reshape(-1, deltas[0].shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # A gradient that is to be differentiated is made of products that can be.
        plain = torch.is_grad_enabled()
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = (flat @ weight if plain else product(flat, weight.t())).view(x.shape)
        if needs_weight:
            rows = x.reshape(-1, x.shape[-1])
            grad_weight = flat.t() @ rows if plain else outer(flat, rows)
        if needs_bias:
            grad_bias = flat.sum(dim=0)
        return grad_x, grad_weight, grad_bias


def add_rows_(target: Tensor, index: Tensor, values: Tensor) -> None:
    """target[index_u] += values_u for every u, repeated indices included.

    target (V, ...), index (U,) int64, values (U, ...) of target's dtype. A CPU adds in the
    order of u. A GPU's `index_add_` is made of atomics, in the order in which they arrive;
    accumulating `index_put_` sorts first.
    """
    if on_gpu(target):
        target.index_put_((index,), values, accumulate=True)
    else:
        target.index_add_(0, index, values)
