"""Handlers of convolutions: Linears on the unfolded input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.fisher.forward.capture import Handlers, OpCall, ParamUse
from fisherkern.fisher.layers.dense import Described, added
from fisherkern.fisher.layers.grads import ConvolutionGrad, GroupedConvolutionGrad


def convolution(call: OpCall) -> Described:
    def bound(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Described:
        if call.dim != 0 or input.dim() != weight.dim():
            return []
        uses: list[tuple[Tensor, ParamUse]] = []
        if (view := call.view_of(weight)) is not None:
            view = view.reshaped(len(weight), weight[0].numel())
            columns = _unfolded(input.detach(), weight, stride, padding, dilation)
            if groups == 1:
                uses.append((weight, ConvolutionGrad(view, columns)))
            else:
                grouped = columns.unflatten(2, (groups, -1))
                uses.append((weight, GroupedConvolutionGrad(view, grouped)))
        return [*uses, *added(call, bias, (len(weight), *[1] * (weight.dim() - 2)))]

    return bound(*call.args, **call.kwargs)


def _unfolded(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
) -> Tensor:
    """(N, C, H, W) or (N, C, W) -> (N, L, C·k), what each output position is computed from."""
    kernel = weight.shape[2:]
    strides, dilations = _each(stride, len(kernel)), _each(dilation, len(kernel))
    if isinstance(padding, str):
        totals = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)
        ]
        # As PyTorch: an odd one is longer on the right. F.pad starts with the last dimension.
        sides = [side for total in totals[::-1] for side in (total // 2, total - total // 2)]
        input, padding = F.pad(input, sides), 0
    paddings = _each(padding, len(kernel))
    if len(kernel) == 1:
        input, kernel = input[:, :, None], torch.Size((1, *kernel))
        strides, dilations, paddings = (1, *strides), (1, *dilations), (0, *paddings)
    return F.unfold(input, kernel, dilations, paddings, strides).transpose(1, 2)


def _each(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


HANDLERS: Handlers = {F.conv1d: convolution, F.conv2d: convolution}
