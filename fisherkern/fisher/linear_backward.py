"""F.linear with the backward pass that the engine needs: to its input, by the faster product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.ops.products import product, rows_product, suits_linear


class _Linear(torch.autograd.Function):
    """x Wᵀ + b. W and b are given no gradient: the engine asks for those of captured outputs."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.transposed = weight.detach().t().contiguous()
        # Not a view of anything, so that the model may overwrite it.
        flat = product(input.reshape(-1, input.shape[-1]), weight, bias)
        return torch.ops.aten._unsafe_view(flat, [*input.shape[:-1], weight.shape[0]])

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return rows_product(deltas[0][None], ctx.transposed)[0], None, None


def linear(
    is_parameter: Callable[[Tensor], bool],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """F.linear, through `_Linear` where weight and bias are parameters themselves, fp32, on a CPU.

    Anything computed from parameters needs its gradient passed on, so F.linear has it.
    """
    given = [weight] if bias is None else [weight, bias]
    serves = suits_linear(input, weight, bias) and all(is_parameter(tensor) for tensor in given)
    return _Linear.apply(input, weight, bias) if serves else F.linear(input, weight, bias)
