"""Triton kernel of `softmax_lse`: a range of items per program, joined in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.ops.launch_table import PRECISION
from fisherkern.ops.tiles_triton import (
    SIZES,
    add_bias,
    add_to_lse,
    dot_settings,
    item_splits,
    kernel_input,
    logit_tile,
    lse_of,
    padded,
)


@triton.jit(do_not_specialize=SIZES)
def softmax_lse_kernel(
    h_ptr, w_ptr, bias_ptr, ranges_ptr, n, v, d, length,
    ROWS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ranges (n, splits) fp64: log Σ exp of the logits in each range of `length` items.

    One program per range and row tile, all in a row: there may be more ranges than the
    65,535 that a grid's other dimensions hold. The rows of a range come one after another.
    """
    row_tiles = tl.cdiv(n, ROWS)
    rows = (tl.program_id(0) % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(0) // row_tiles
    first = split * length
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(first, first + tl.minimum(length, v - first), ITEMS):
        items = start + tl.arange(0, ITEMS).to(tl.int64)
        z = logit_tile(h_ptr, w_ptr, rows, items, n, v, d, WIDTH, CHUNKS, DOT, PRECISION)
        highest, total = add_to_lse(add_bias(z, bias_ptr, items, v), highest, total)
    splits = tl.num_programs(0) // row_tiles
    out = ranges_ptr + rows * splits + split
    # fp64: samplers add up the masses of thousands of ranges.
    tl.store(out, lse_of(highest, total), mask=rows < n)


def softmax_lse(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    h, weight = padded(h), padded(weight)
    row, _ = dot_settings("softmax_lse", h, weight)
    _, length = item_splits(weight.shape[0], row.items, triton.cdiv(h.shape[0], row.rows))
    return torch.logsumexp(range_lse(h, weight, bias, length), dim=1).float()


def range_lse(h: Tensor, weight: Tensor, bias: Tensor | None, length: int) -> Tensor:
    """log Σ exp over every `length` items, a whole number of tiles: (N, ⌈V / length⌉) fp64."""
    h, weight, bias = padded(h), padded(weight), kernel_input(bias)
    row, constants = dot_settings("softmax_lse", h, weight)
    n, v = h.shape[0], weight.shape[0]
    splits = triton.cdiv(v, length)
    ranges = torch.empty(n, splits, dtype=torch.float64, device=h.device)
    with torch.cuda.device_of(h):
        softmax_lse_kernel[triton.cdiv(n, row.rows) * splits,](
            h, weight, bias, ranges, n, v, h.shape[1], length,
            ROWS=row.rows, ITEMS=row.items, PRECISION=PRECISION, **constants,
        )  # fmt: skip
    return ranges
