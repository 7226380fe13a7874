"""Triton kernel of `softmax_sketch`: a bucket's items per program, signs made in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.ops import counter_rng
from fisherkern.ops.launch_table import PRECISION
from fisherkern.ops.tiles_triton import (
    LOG2_E,
    SIZES,
    add_bias,
    dot_settings,
    item_splits,
    kernel_input,
    logit_tile,
    padded,
    random_words,
)


@triton.jit(do_not_specialize=SIZES)
def softmax_sketch_kernel(
    h_ptr, w_ptr, bias_ptr, lse_ptr, centre_ptr, rotation_ptr, keys_ptr, bit_ptr,
    sums_ptr, totals_ptr, n, v, d, length, blocks, probes,
    ROWS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums (splits, n, probes, d): Σ_v sqrt(p_v) ε_v (w_v − centre) over the items v that a
    range of blocks has in a bucket, totals (splits, n, probes): Σ_v sqrt(p_v) ε_v.
    Grid: (rows, columns, buckets) × splits, as there may be more of each of the three than
    the 65,535 that a grid's other dimensions hold.
    """
    row_tiles = tl.cdiv(n, ROWS)
    rows = (tl.program_id(0) % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(0) // row_tiles % CHUNKS * WIDTH
    bucket = tl.program_id(0) // (row_tiles * CHUNKS)
    column = first_column + tl.arange(0, WIDTH)
    split = tl.program_id(1)
    first = split * length
    half_lse = tl.load(lse_ptr + rows, mask=rows < n, other=float("inf")) * (0.5 * LOG2_E)
    keys = tl.load(keys_ptr + rows, mask=rows < n, other=0)
    bit = tl.load(bit_ptr + rows, mask=rows < n, other=0)
    centre = tl.load(centre_ptr + column, mask=column < d, other=0.0)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    totals = tl.zeros((ROWS,), tl.float32)
    for start in range(first, first + tl.minimum(length, blocks - first), ITEMS):
        block = start + tl.arange(0, ITEMS).to(tl.int64)
        rotation = tl.load(rotation_ptr + block, mask=block < blocks, other=0)
        # Blocks past the last give items past the last.
        items = block * probes + (bucket + probes - rotation) % probes
        z = logit_tile(h_ptr, w_ptr, rows, items, n, v, d, WIDTH, CHUNKS, DOT, PRECISION)
        z = add_bias(z, bias_ptr, items, v)
        root = tl.exp2(z * (0.5 * LOG2_E) - half_lse[:, None])  # of p, (ROWS, ITEMS)
        words = random_words(keys[:, None], items[None, :]) >> bit[:, None]
        signed = tl.where((words & 1) == 0, root, -root)
        mask = (items < v)[:, None] & (column < d)[None, :]
        w = tl.load(w_ptr + items[:, None] * d + column[None, :], mask=mask, other=0.0)
        w = w.to(tl.float32) - centre[None, :]
        sums = tl.dot(signed, w, sums, input_precision=PRECISION)
        totals += tl.sum(signed, 1)
    place = (split.to(tl.int64) * n + rows) * probes + bucket
    out = sums_ptr + place[:, None] * d + column[None, :]
    tl.store(out, sums, mask=(rows < n)[:, None] & (column < d)[None, :])
    if first_column == 0:
        tl.store(totals_ptr + place, totals, mask=rows < n)


def softmax_sketch(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    mean: Tensor,
    rows: Tensor,
    probes: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    n, d = h.shape
    h, weight, bias, lse = (
        padded(h),
        padded(weight),
        kernel_input(bias),
        kernel_input(lse.float()),
    )
    row, constants = dot_settings("softmax_sketch", h, weight)
    v, width = weight.shape
    rotations = counter_rng.catalogue_rotations(seed, v, probes, h.device).int()
    programs = triton.cdiv(n, row.rows) * constants["CHUNKS"] * probes
    splits, length = item_splits(len(rotations), row.items, programs)
    # Centred by the rows' common mean: what is left to subtract cancels little.
    centre = mean.float().mean(dim=0)
    sums = torch.empty(splits, n, probes, width, dtype=torch.float32, device=h.device)
    totals = torch.empty(splits, n, probes, dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):
        softmax_sketch_kernel[programs, splits](
            h, weight, bias, lse, padded(centre), rotations, *counter_rng.sign_keys(seed, rows),
            sums, totals, n, v, width, length, len(rotations), probes,
            ROWS=row.rows, ITEMS=row.items, PRECISION=PRECISION, **constants,
        )  # fmt: skip
    joined, total = sums[..., :d].sum(dim=0), totals.sum(dim=0)
    joined -= total[:, :, None] * (mean - centre)[:, None]
    return joined, total
