"""Triton kernel of `sample_distinct`: the logits of chosen ranges of items.

The ranges' masses come from `softmax_mean`'s kernel and the noise is PyTorch's, on few
numbers; what is left is a gather that no matrix product serves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.ops.launch_table import launch
from fisherkern.ops.softmax_lse import RANGE
from fisherkern.ops.tiles_triton import SIZES, kernel_input, padded, width_tile


@triton.jit(do_not_specialize=SIZES)
def sample_distinct_kernel(
    h_ptr, w_ptr, bias_ptr, part_ptr, z_ptr, v, d, m, length,
    ITEMS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """z (n · m, length): logits of the items of each range; −inf past the last item."""
    place = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(0) // m).to(tl.int64)
    inside = tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    items = tl.load(part_ptr + place) * length + inside
    valid = items < v
    z = tl.zeros((ITEMS,), tl.float32)
    for chunk in range(CHUNKS):
        c = chunk * WIDTH + tl.arange(0, WIDTH)
        h = tl.load(h_ptr + row * d + c, mask=c < d, other=0.0).to(tl.float32)
        mask = valid[:, None] & (c < d)[None, :]
        w = tl.load(w_ptr + items[:, None] * d + c[None, :], mask=mask, other=0.0)
        z += tl.sum(w.to(tl.float32) * h[None, :], 1)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + items, mask=valid, other=0.0).to(tl.float32)
    tl.store(z_ptr + place * length + inside, tl.where(valid, z, float("-inf")))


def range_logits(h: Tensor, weight: Tensor, bias: Tensor | None, parts: Tensor) -> Tensor:
    h, weight, bias, parts = (
        padded(h),
        padded(weight),
        kernel_input(bias),
        kernel_input(parts),
    )
    row = launch("sample_distinct", h.device, h.dtype)
    d = h.shape[1]
    width = width_tile(d, row.width)
    z = torch.empty(*parts.shape, RANGE, dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):
        sample_distinct_kernel[parts.numel(), triton.cdiv(RANGE, row.items)](
            h, weight, bias, parts, z, weight.shape[0], d, parts.shape[1], RANGE,
            ITEMS=row.items, WIDTH=width, CHUNKS=triton.cdiv(d, width),
            num_warps=row.warps, num_stages=row.stages,
        )  # fmt: skip
    return z
