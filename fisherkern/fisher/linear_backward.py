"""F.linear with the backward pass that the engine needs: to its input, by the faster product.

On a CPU PyTorch hands fp32 products to MKL, whose AVX-512 kernels are for Intel's
processors alone; oneDNN, in the same PyTorch, has them for all: on one thread of an AMD
EPYC the products of a backward pass at D = 64 take 40 % of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Linear(torch.autograd.Function):
    """x Wᵀ + b. W and b are given no gradient: the engine asks for those of captured outputs."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.transposed = weight.detach().t().contiguous()
        # Not a view of anything, so that the model may overwrite it.
        flat = _product(input.reshape(-1, input.shape[-1]), weight, bias)
        return torch.ops.aten._unsafe_view(flat, [*input.shape[:-1], weight.shape[0]])

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, None, None]:
        wanted = ctx.needs_input_grad[0]
        return _product(deltas[0], ctx.transposed, None) if wanted else None, None, None


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


# The operator is PyTorch's own but not public; where it is missing F.linear serves.
_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
    suits = (
        _AVAILABLE
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (input, *given))
        and weight.dim() == 2
        and input.dim() > 1
        and all(is_parameter(tensor) for tensor in given)
    )
    return _Linear.apply(input, weight, bias) if suits else F.linear(input, weight, bias)
