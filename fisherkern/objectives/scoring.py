"""The full softmax over the catalogue, without a (places, V) matrix where that is large."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.ops.products import add_outer_, product, suits
from fisherkern.ops.softmax_lse import exp_minus_

# Logits held at once on a CPU: few where autograd has them; 8 MB of float32 in a tile, which are
# near enough from the product that makes them to the two that use them, and few products.
_WHOLE = 1 << 16
_TILE = 1 << 21
# How much more elsewhere, where a tile is worth its launches only when it is large.
_WHOLE_FACTOR = 256
_TILE_FACTOR = 2
# A tile's rows on a CPU are a multiple of this, the last one's filled up: the number of places
# changes from step to step, and the faster products want few different shapes.
_ROWS = 64

#: Of P places, those that this process scores and what their mean counts for: several processes
#: that train one model set it, each for its own share, so that the mean over the processes is
#: the loss of all places. None: all of them.
LOCAL_SLICE: ContextVar[Callable[[int], tuple[slice, float]] | None]
LOCAL_SLICE = ContextVar("LOCAL_SLICE", default=None)


def softmax_loss(h: Tensor, column: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Mean over P places of -log softmax(W h + b)[column], 0-dim.

    `h` is (P, D), `column` (P,) int64 in 0..V-1, `weight` (V, D), `bias` (V,) or None. With up to
    2^16 logits (2^24 on a GPU) they are held as autograd does. Beyond that a tile of them is made,
    and its gradient with it, so a step costs the same three products and holds 2^21 logits (2^22;
    one row where V is larger) and the gradients of h, W and b; it can be differentiated once.
    """
    share = LOCAL_SLICE.get()
    if share is not None:
        places, factor = share(h.shape[0])
        return factor * _mean_loss(h[places], column[places], weight, bias)
    return _mean_loss(h, column, weight, bias)


def _mean_loss(h: Tensor, column: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    whole, tile = _WHOLE, _TILE
    if h.device.type != "cpu":
        whole, tile = _WHOLE_FACTOR * whole, _TILE_FACTOR * tile
    if h.shape[0] * weight.shape[0] <= whole:
        return F.cross_entropy(F.linear(h, weight, bias), column)
    rows = max(1, tile // weight.shape[0])
    multiple = _ROWS if suits(h, weight) and rows >= _ROWS else 1
    arguments = (h, column, weight, bias, rows // multiple * multiple, multiple)
    return _TiledSoftmaxLoss.apply(*arguments)  # type: ignore[no-untyped-call]


class _TiledSoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        column: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: int,
        multiple: int,
    ) -> Tensor:
        device = h.device.type
        # Autocast casts for a product, but not for what is written into or added to.
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        x, w = h.to(low), weight.to(low)
        total = weight.new_zeros(())
        grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for first in range(0, h.shape[0], rows):
            part = slice(first, first + rows)
            index = column[part, None]
            own = _filled(x[part], multiple)
            whole = product(own, w).to(weight.dtype)
            logits = whole[: len(index)]
            if bias is not None:
                logits += bias
            highest = logits.amax(dim=1, keepdim=True)
            score = logits.gather(1, index)
            # p - 1[v = column], the gradient of the logits, in their place.
            error = exp_minus_(logits, highest)
            normaliser = error.sum(dim=1, keepdim=True)
            total += (normaliser.log() + highest - score).sum()
            error /= normaliser
            error.scatter_add_(1, index, error.new_full(index.shape, -1.0))
            if grad_bias is not None:
                grad_bias += error.sum(dim=0)
            whole[len(index) :] = 0
            whole = whole.to(low)
            grad_h[part] = product(whole, w.t())[: len(index)]
            add_outer_(grad_weight, whole, own)
        ctx.save_for_backward(grad_h, grad_weight, grad_bias)
        return total / h.shape[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_weight, grad_bias = ctx.saved_tensors
        scale = grad / grad_h.shape[0]
        return (
            grad_h * scale,
            None,
            grad_weight * scale,
            None if grad_bias is None else grad_bias * scale,
            None,
            None,
        )


def _filled(rows: Tensor, multiple: int) -> Tensor:
    """Append so many rows of zeros that the number of rows is a multiple."""
    return F.pad(rows, (0, 0, 0, -len(rows) % multiple))
