"""Activations whose backward pass is made cheaper: each probe goes through them once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.fisher.forward.capture import CapturedCall, Handlers, Rewrite
from fisherkern.fisher.forward.fast_ops import apply
from fisherkern.fisher.forward.slices import Slice, SliceRule


class _Gelu(torch.autograd.Function):
    """F.gelu with its derivative kept: every probe's backward pass is one product, not an erf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        one = torch.ones_like(x)
        ctx.save_for_backward(torch.ops.aten.gelu_backward(one, x, approximate=approximate))
        return F.gelu(x, approximate=approximate)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor, None]:
        (derivative,) = ctx.saved_tensors
        return deltas[0] * derivative, None

    @staticmethod
    def slice_rule(ctx: Any, shape: torch.Size, given: Slice) -> SliceRule:
        factor = given.of(ctx.saved_tensors[0])
        return SliceRule(lambda delta: [delta * factor], [given])


def gelu(call: CapturedCall, input: Tensor, *, approximate: str = "none") -> Any:
    return apply(_Gelu, input, approximate)


HANDLERS: Handlers = {F.gelu: Rewrite(gelu)}
