"""F.layer_norm with the backward pass that the engine needs: to its input, of many probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern import ops


class _LayerNorm(torch.autograd.Function):
    """Over the last dimension. Weight and bias are given no gradient, as in `_Linear`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        shape = [input.shape[-1]]
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
        found = ops.layer_norm_backward(rows, normalised, weight, rstd)
        return found.view(delta.shape), None, None, None


def layer_norm(
    is_parameter: Callable[[Tensor], bool],
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """F.layer_norm, through `_LayerNorm` for the last dimension in fp32 or fp64.

    Where weight and bias are parameters themselves or None: anything computed from parameters
    needs its gradient passed on, so F.layer_norm has it.
    """
    affine = [tensor for tensor in (weight, bias) if tensor is not None]
    serves = (
        torch.is_grad_enabled()
        and input.dtype in (torch.float32, torch.float64)
        and not (input.is_nested or torch.is_autocast_enabled(input.device.type))
        and input.numel() > 0
        and tuple(normalized_shape) == input.shape[-1:]
        and all(tensor.dtype == input.dtype and is_parameter(tensor) for tensor in affine)
    )
    if serves:
        return _LayerNorm.apply(input, weight, bias, eps)
    return F.layer_norm(input, list(normalized_shape), weight, bias, eps)
