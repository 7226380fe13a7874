"""Handlers of normalisations: a gain on what was normalised, and a bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.fisher.forward.capture import Handlers, OpCall
from fisherkern.fisher.layers.dense import Described, added, scaled


def _affine(
    call: OpCall, normalised: Tensor, weight: Tensor | None, bias: Tensor | None, channel: bool
) -> Described:
    """Gain and bias of the last dimensions, or of dimension 1 where it is the channels'."""
    shape = None
    if channel and (some := weight if weight is not None else bias) is not None:
        shape = [*some.shape, *[1] * (call.output.dim() - 2)]
    return [*scaled(call, weight, normalised, shape), *added(call, bias, shape)]


def handle_layer_norm(call: OpCall) -> Described:
    def bound(
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Described:
        x = F.layer_norm(input.detach(), list(normalized_shape), None, None, eps)
        return _affine(call, x, weight, bias, channel=False)

    return bound(*call.args, **call.kwargs)


def rms_norm(call: OpCall) -> Described:
    def bound(
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Described:
        x = F.rms_norm(input.detach(), list(normalized_shape), None, eps)
        return _affine(call, x, weight, None, channel=False)

    return bound(*call.args, **call.kwargs)


def batch_norm(call: OpCall) -> Described:
    """With running statistics alone: those of the batch mix the sequences."""

    def bound(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Described:
        if training or call.dim == 1:
            return []
        x = F.batch_norm(input.detach(), running_mean, running_var, eps=eps)
        return _affine(call, x, weight, bias, channel=True)

    return bound(*call.args, **call.kwargs)


def group_norm(call: OpCall) -> Described:
    def bound(
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Described:
        if call.dim == 1:
            return []
        x = F.group_norm(input.detach(), num_groups, None, None, eps)
        return _affine(call, x, weight, bias, channel=True)

    return bound(*call.args, **call.kwargs)


HANDLERS: Handlers = {
    F.layer_norm: handle_layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.batch_norm: batch_norm,
    F.group_norm: group_norm,
}
