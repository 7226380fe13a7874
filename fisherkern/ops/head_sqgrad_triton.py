"""Triton kernels of `head_sqgrad_`: the streamed dense part and the sparse one.

Each tile of a Fisher belongs to one program, which adds to it in a fixed order: the
dense kernel's tiles are ranges of items, the sparse kernel's are single items, whose
occurrences are found by a stable sort. No atomics, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.ops.launch_table import PRECISION, launch
from fisherkern.ops.tiles_triton import (
    LOG2_E,
    SIZES,
    dot_settings,
    fp32_accumulator,
    kernel_input,
    logit_tile,
    padded,
    width_tile,
)


@triton.jit(do_not_specialize=SIZES)
def head_sqgrad_kernel(
    weight_fisher_ptr, bias_fisher_ptr, h_ptr, w_ptr, bias_ptr, lse_ptr, total_ptr,
    n, v, d, d_out,
    ROWS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add Σ_n c_nv h_n² to weight_fisher (v, d_out) and Σ_n c_nv to bias_fisher (v,).

    c = p (1 − p), or total_n p² where total is given. One program per (items, columns).
    The columns of h (n, d) and w (v, d) from d_out on are zeros. The difference z − lse comes
    before the factor log2 e: where an item has all the mass it is 0, and so is 1 − p.
    """
    items = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + items, mask=items < v, other=0.0).to(tl.float32)
    squares = tl.zeros((ITEMS, WIDTH), tl.float32)
    sums = tl.zeros((ITEMS,), tl.float32)
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        z = logit_tile(w_ptr, h_ptr, items, rows, v, n, d, WIDTH, CHUNKS, DOT, PRECISION)
        if bias_ptr is not None:
            z += bias[:, None]
        # Past the last row lse is +inf and p zero.
        lse = tl.load(lse_ptr + rows, mask=rows < n, other=float("inf"))
        p = tl.exp2((z - lse[None, :]) * LOG2_E)  # (ITEMS, ROWS)
        if total_ptr is None:
            coefficient = p - p * p
        else:
            total = tl.load(total_ptr + rows, mask=rows < n, other=0.0)
            coefficient = total[None, :] * p * p
        if weight_fisher_ptr is not None:
            mask = (rows < n)[:, None] & (column < d)[None, :]
            h = tl.load(h_ptr + rows[:, None] * d + column[None, :], mask=mask, other=0.0)
            h = h.to(tl.float32)
            squares = tl.dot(coefficient, h * h, squares, input_precision=PRECISION)
        sums += tl.sum(coefficient, 1)
    if weight_fisher_ptr is not None:
        out = weight_fisher_ptr + items[:, None] * d_out + column[None, :]
        mask = (items < v)[:, None] & (column < d_out)[None, :]
        tl.store(out, tl.load(out, mask=mask, other=0.0) + squares, mask=mask)
    if bias_fisher_ptr is not None:
        if tl.program_id(1) == 0:
            sums += tl.load(bias_fisher_ptr + items, mask=items < v, other=0.0)
            tl.store(bias_fisher_ptr + items, sums, mask=items < v)


@triton.jit(do_not_specialize=SIZES)
def head_sqgrad_sparse_kernel(
    weight_fisher_ptr, bias_fisher_ptr, h_ptr, w_ptr, bias_ptr, lse_ptr,
    ids_ptr, order_ptr, stop_ptr, omega_ptr, d, d_out, k,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Add Σ_j ω_j (1 − 2 p_v) h² over the occurrences j of item v = y_j.

    ids (N·k,) ascending, order: where in (N, k) each came from, stop: the end of its
    item's run. The program at a run's first place adds the run, the others return.
    """
    first = tl.program_id(0)
    item = tl.load(ids_ptr + first)
    if first > 0:
        if tl.load(ids_ptr + first - 1) == item:
            return
    last = tl.load(stop_ptr + first).to(tl.int32)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    squares = tl.zeros((WIDTH,), tl.float32)
    total = 0.0
    for start in range(first, last, ROWS):
        place = start + tl.arange(0, ROWS)
        valid = place < last
        source = tl.load(order_ptr + place, mask=valid, other=0)
        row = (source.to(tl.int32) // k).to(tl.int64)  # as many as programs: they fit
        z = tl.zeros((ROWS,), tl.float32)
        for chunk in range(CHUNKS):
            c = chunk * WIDTH + tl.arange(0, WIDTH)
            mask = valid[:, None] & (c < d)[None, :]
            h = tl.load(h_ptr + row[:, None] * d + c[None, :], mask=mask, other=0.0)
            w = tl.load(w_ptr + item * d + c, mask=c < d, other=0.0)
            z += tl.sum(h.to(tl.float32) * w.to(tl.float32)[None, :], 1)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + item).to(tl.float32)
        lse = tl.load(lse_ptr + row, mask=valid, other=float("inf"))
        p = tl.exp2((z - lse) * LOG2_E)
        omega = tl.load(omega_ptr + source, mask=valid, other=0.0)
        coefficient = omega * (1 - 2 * p)  # (ROWS,)
        mask = valid[:, None] & (column < d)[None, :]
        h = tl.load(h_ptr + row[:, None] * d + column[None, :], mask=mask, other=0.0)
        h = h.to(tl.float32)
        squares += tl.sum(coefficient[:, None] * h * h, 0)
        total += tl.sum(coefficient, 0)
    if weight_fisher_ptr is not None:
        out = weight_fisher_ptr + item * d_out + column
        mask = column < d_out
        tl.store(out, tl.load(out, mask=mask, other=0.0) + squares, mask=mask)
    if bias_fisher_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(bias_fisher_ptr + item, tl.load(bias_fisher_ptr + item) + total)


def head_sqgrad_(
    weight_fisher: Tensor | None,
    bias_fisher: Tensor | None,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ids: Tensor | None,
    omega: Tensor | None,
) -> None:
    n, d_out = h.shape
    h, weight, bias, lse = (
        padded(h),
        padded(weight),
        kernel_input(bias),
        kernel_input(lse.float()),
    )
    v, d = weight.shape
    row, constants = dot_settings("head_sqgrad_", h, weight)
    with fp32_accumulator(weight_fisher) as squares, fp32_accumulator(bias_fisher) as sums:
        total = None if omega is None else omega.float().sum(dim=1)
        with torch.cuda.device_of(h):
            head_sqgrad_kernel[triton.cdiv(v, row.items), constants["CHUNKS"]](
                squares, sums, h, weight, bias, lse, total, n, v, d, d_out,
                ROWS=row.rows, ITEMS=row.items, PRECISION=PRECISION, **constants,
            )  # fmt: skip
        if ids is None or omega is None:
            return
        sorted_ids, order = torch.sort(ids.flatten(), stable=True)
        stop = torch.searchsorted(sorted_ids, sorted_ids, right=True)
        row = launch("head_sqgrad_sparse", h.device, h.dtype)
        width = width_tile(d, row.width)
        chunks = triton.cdiv(d, width)
        with torch.cuda.device_of(h):
            head_sqgrad_sparse_kernel[len(order), chunks](
                squares, sums, h, weight, bias, lse,
                sorted_ids, order, stop, kernel_input(omega.float()), d, d_out, ids.shape[1],
                ROWS=row.rows, WIDTH=width, CHUNKS=chunks,
                num_warps=row.warps, num_stages=row.stages,
            )  # fmt: skip
