"""Triton kernels of `sample_items`: the ranges' masses added up, then a search in one.

The cumulative distribution is never stored: a draw falls into the range where the
ranges' masses, added up in fp64, first exceed it, and only that range is looked at.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.ops import counter_rng
from fisherkern.ops.launch_table import launch
from fisherkern.ops.softmax_lse import RANGE, chosen_range
from fisherkern.ops.tiles_triton import LOG2_E, SIZES, kernel_input, padded, width_tile


@triton.jit(do_not_specialize=SIZES)
def sample_items_total_kernel(mass_ptr, ranges, ITEMS: tl.constexpr):
    """mass (n, ranges) becomes its running sum, one program per row, always in this order."""
    row = mass_ptr + tl.program_id(0).to(tl.int64) * ranges
    below = tl.zeros((), tl.float64)
    for start in range(0, ranges, ITEMS):
        place = start + tl.arange(0, ITEMS)
        mass = tl.load(row + place, mask=place < ranges, other=0.0)
        total = below + tl.cumsum(mass, 0)
        tl.store(row + place, total, mask=place < ranges)
        below = tl.max(total, 0)


@triton.jit(do_not_specialize=SIZES)
def sample_items_kernel(
    h_ptr, w_ptr, bias_ptr, lse_ptr, part_ptr, below_ptr, u_ptr, ids_ptr, v, d, k, length,
    ITEMS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """ids (n, k): one program per draw counts its range's cdf values <= u."""
    draw = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(0) // k).to(tl.int64)
    lse = tl.load(lse_ptr + row) * LOG2_E
    below = tl.load(below_ptr + draw)
    u = tl.load(u_ptr + draw)
    first = tl.load(part_ptr + draw) * length
    last = tl.minimum(first + length, v)
    found = first
    for start in range(first, last, ITEMS):
        items = start + tl.arange(0, ITEMS)
        valid = items < last
        z = tl.zeros((ITEMS,), tl.float32)
        for chunk in range(CHUNKS):
            c = chunk * WIDTH + tl.arange(0, WIDTH)
            h = tl.load(h_ptr + row * d + c, mask=c < d, other=0.0).to(tl.float32)
            mask = valid[:, None] & (c < d)[None, :]
            w = tl.load(w_ptr + items[:, None] * d + c[None, :], mask=mask, other=0.0)
            z += tl.sum(w.to(tl.float32) * h[None, :], 1)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + items, mask=valid, other=0.0).to(tl.float32)
        p = tl.where(valid, tl.exp2(z * LOG2_E - lse), 0.0).to(tl.float64)
        cdf = below + tl.cumsum(p, 0)
        found += tl.sum((valid & (cdf <= u)).to(tl.int64), 0)
        below = tl.max(cdf, 0)
    tl.store(ids_ptr + draw, tl.minimum(found, v - 1))


def sample_items(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ranges: Tensor,
    rows: Tensor,
    k: int,
    seed: int,
) -> Tensor:
    h, weight, bias, lse = (
        padded(h),
        padded(weight),
        kernel_input(bias),
        kernel_input(lse.float()),
    )
    n, v, d = h.shape[0], weight.shape[0], h.shape[1]
    mass = (ranges - lse[:, None].double()).exp_()
    row = launch("sample_items_total", h.device, h.dtype)
    with torch.cuda.device_of(h):
        sample_items_total_kernel[n,](
            mass, mass.shape[1], ITEMS=row.items, num_warps=row.warps, num_stages=row.stages
        )
    u = counter_rng.uniform(seed, rows, torch.arange(k, device=h.device))
    part, below = chosen_range(mass, u)
    ids = torch.empty(n, k, dtype=torch.int64, device=h.device)
    row = launch("sample_items", h.device, h.dtype)
    width = width_tile(d, row.width)
    with torch.cuda.device_of(h):
        sample_items_kernel[n * k,](
            h, weight, bias, lse, part, below, u, ids, v, d, k, RANGE,
            ITEMS=row.items, WIDTH=width, CHUNKS=triton.cdiv(d, width),
            num_warps=row.warps, num_stages=row.stages,
        )  # fmt: skip
    return ids
