"""Common layers with the backward pass that the engine needs: to the input alone.

Parameters are given no gradient: the engine makes theirs from the gradients at captured outputs.
So the caller may use these only where weight and bias are parameters themselves or None; what
is computed from parameters needs its gradient passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern import ops
from fisherkern.fisher.forward.slices import Slice, SliceRule
from fisherkern.ops.products import product, rows_product, suits_linear


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, which torch leaves without annotations."""
    return function.apply(*args)


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, by the faster product."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.transposed = weight.detach().t().contiguous()
        # Not a view of anything, so that the model may overwrite it.
        flat = product(input.reshape(-1, input.shape[-1]), weight, bias)
        result: Tensor = torch.ops.aten._unsafe_view(flat, [*input.shape[:-1], weight.shape[0]])
        return result

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return rows_product(deltas[0][None], ctx.transposed)[0], None, None

    @staticmethod
    def slice_rule(ctx: Any, shape: torch.Size, given: Slice) -> SliceRule | None:
        if given.dim == len(shape) - 1:
            return None
        return SliceRule(lambda delta: [rows_product(delta, ctx.transposed)], [given])


class _Pointwise(torch.autograd.Function):
    """F.conv1d of one column at a time: a linear map of the channels, (N, C, L) to (N, O, L)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.transposed = weight.detach()[:, :, 0].t().contiguous()
        by_column = input.transpose(1, 2)
        flat = product(by_column.reshape(-1, by_column.shape[2]), weight[:, :, 0], bias)
        # Channels last, and no view of anything, as in `_Linear`.
        return flat.view(*by_column.shape[:2], len(weight)).transpose(1, 2).clone()

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        by_column = rows_product(deltas[0].transpose(1, 2)[None], ctx.transposed)[0]
        return by_column.transpose(1, 2), None, None

    @staticmethod
    def slice_rule(ctx: Any, shape: torch.Size, given: Slice) -> SliceRule | None:
        def function(delta: Tensor) -> list[Tensor | None]:
            by_column = rows_product(delta.transpose(2, 3), ctx.transposed)
            return [by_column.transpose(2, 3)]

        return SliceRule(function, [given]) if given.dim != 1 else None


class _LayerNorm(torch.autograd.Function):
    """Layer norm over the last dimension."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        shape = [input.shape[-1]]
        output: Tensor
        output, _, rstd = torch.native_layer_norm(input, shape, weight, bias, eps)
        normalised = F.layer_norm(input, shape, None, None, eps)
        ctx.save_for_backward(normalised.reshape(-1, *shape), weight, rstd.flatten())
        return output

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (delta,), (normalised, weight, rstd) = deltas, ctx.saved_tensors
        rows = delta.reshape(1, *normalised.shape)
        result = ops.layer_norm_backward(rows, normalised, weight, rstd)
        return result.view(delta.shape), None, None, None

    @staticmethod
    def slice_rule(ctx: Any, shape: torch.Size, given: Slice) -> SliceRule | None:
        if given.dim == len(shape) - 1:
            return None
        normalised, weight, rstd = ctx.saved_tensors
        normalised = given.of(normalised.view(shape)).reshape(-1, shape[-1])
        rstd = given.of(rstd.view(shape[:-1])).flatten()

        def function(delta: Tensor) -> list[Tensor | None]:
            rows = delta.reshape(len(delta), *normalised.shape)
            result = ops.layer_norm_backward(rows, normalised, weight, rstd)
            return [result.view(delta.shape)]

        return SliceRule(function, [given])


# Nodes of the autograd graph at which a parameter's gradient ends.
WITHOUT_PARAMETERS: tuple[type, ...] = (
    _Linear._backward_cls,
    _Pointwise._backward_cls,
    _LayerNorm._backward_cls,
)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, through `_Linear` in fp32 on a CPU."""
    if not suits_linear(input, weight, bias):
        return F.linear(input, weight, bias)
    result: Tensor = apply(_Linear, input, weight, bias)
    return result


def pointwise_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """F.conv1d, through `_Pointwise` for a kernel of one in fp32 on a CPU."""
    plain = stride in (1, (1,)) and padding in (0, (0,)) and groups == 1
    if (
        not plain
        or not input.dim() == weight.dim() == 3
        or weight.shape[1:] != (input.shape[1], 1)
        or not suits_linear(input, weight[:, :, 0], bias)
    ):
        return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    result: Tensor = apply(_Pointwise, input, weight, bias)
    return result


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """F.layer_norm, through `_LayerNorm` for the last dimension in fp32 or fp64."""
    affine = [tensor for tensor in (weight, bias) if tensor is not None]
    serves = (
        torch.is_grad_enabled()
        and input.dtype in (torch.float32, torch.float64)
        and not (input.is_nested or torch.is_autocast_enabled(input.device.type))
        and input.numel() > 0
        and tuple(normalized_shape) == input.shape[-1:]
        and all(tensor.dtype == input.dtype for tensor in affine)
    )
    if not serves:
        return F.layer_norm(input, list(normalized_shape), weight, bias, eps)
    result: Tensor = apply(_LayerNorm, input, weight, bias, eps)
    return result
