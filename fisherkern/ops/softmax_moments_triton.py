"""Triton kernels of `softmax_mean` and `softmax_covariance`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.ops.launch_table import PRECISION
from fisherkern.ops.softmax_lse import RANGE
from fisherkern.ops.softmax_lse_triton import range_lse
from fisherkern.ops.tiles_triton import (
    LOG2_E,
    SIZES,
    add_bias,
    dot_settings,
    item_splits,
    kernel_input,
    logit_tile,
    padded,
)


@triton.jit(do_not_specialize=SIZES)
def softmax_mean_kernel(
    h_ptr, w_ptr, bias_ptr, lse_ptr, mean_ptr, n, v, d, length,
    ROWS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """mean (splits, n, d): Σ p_v w_v over each range of `length` items."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    split = tl.program_id(2)
    first = split * length
    # Past the last row lse is +inf and p zero.
    lse = tl.load(lse_ptr + rows, mask=rows < n, other=float("inf")) * LOG2_E
    mean = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(first, first + tl.minimum(length, v - first), ITEMS):
        items = start + tl.arange(0, ITEMS).to(tl.int64)
        z = logit_tile(h_ptr, w_ptr, rows, items, n, v, d, WIDTH, CHUNKS, DOT, PRECISION)
        p = tl.exp2(add_bias(z, bias_ptr, items, v) * LOG2_E - lse[:, None])  # (ROWS, ITEMS)
        mask = (items < v)[:, None] & (column < d)[None, :]
        w = tl.load(w_ptr + items[:, None] * d + column[None, :], mask=mask, other=0.0)
        mean = tl.dot(p, w.to(tl.float32), mean, input_precision=PRECISION)
    out = mean_ptr + (split.to(tl.int64) * n + rows[:, None]) * d + column[None, :]
    tl.store(out, mean, mask=(rows < n)[:, None] & (column < d)[None, :])


@triton.jit(do_not_specialize=SIZES)
def softmax_covariance_kernel(
    h_ptr, w_ptr, bias_ptr, lse_ptr, mean_ptr, covariance_ptr, v, d,
    ITEMS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """covariance (n, d, d): one program per row and pair of column tiles, upper pairs only.

    Both factors are sqrt(p) (w − w̄), so nothing cancels and no w̄ w̄ᵀ is subtracted.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) > tl.program_id(2):
        return
    left = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    right = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    half_lse = tl.load(lse_ptr + row) * (0.5 * LOG2_E)
    left_mean = tl.load(mean_ptr + row * d + left, mask=left < d, other=0.0)
    right_mean = tl.load(mean_ptr + row * d + right, mask=right < d, other=0.0)
    sums = tl.zeros((WIDTH, WIDTH), tl.float32)
    for start in range(0, v, ITEMS):
        items = start + tl.arange(0, ITEMS).to(tl.int64)
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
        z = tl.where(valid, z, float("-inf"))
        root = tl.exp2(z * (0.5 * LOG2_E) - half_lse)[:, None]  # of p
        mask = valid[:, None] & (left < d)[None, :]
        a = tl.load(w_ptr + items[:, None] * d + left[None, :], mask=mask, other=0.0)
        a = root * (a.to(tl.float32) - left_mean[None, :])  # (ITEMS, WIDTH)
        mask = valid[:, None] & (right < d)[None, :]
        b = tl.load(w_ptr + items[:, None] * d + right[None, :], mask=mask, other=0.0)
        b = root * (b.to(tl.float32) - right_mean[None, :])
        sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
    mask = (left < d)[:, None] & (right < d)[None, :]
    out = covariance_ptr + row * d * d
    if tl.program_id(1) == tl.program_id(2):
        # The products' rounding is not symmetric, a covariance is.
        sums = 0.5 * (sums + tl.trans(sums))
    else:
        tl.store(out + right[None, :] * d + left[:, None], sums, mask=mask)
    tl.store(out + left[:, None] * d + right[None, :], sums, mask=mask)


def softmax_mean(h: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    d = h.shape[1]
    h, weight = padded(h), padded(weight)
    ranges = range_lse(h, weight, bias, RANGE)
    lse = torch.logsumexp(ranges, dim=1).float()
    return lse, mean_given_lse(h, weight, bias, lse)[:, :d].contiguous(), ranges


def mean_given_lse(h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor) -> Tensor:
    """w̄ (N, D) of h and weight that are `padded`."""
    bias, lse = kernel_input(bias), kernel_input(lse.float())
    row, constants = dot_settings("softmax_mean", h, weight)
    n, v, d = h.shape[0], weight.shape[0], h.shape[1]
    programs = triton.cdiv(n, row.rows), constants["CHUNKS"]
    splits, length = item_splits(v, row.items, programs[0] * programs[1])
    mean = torch.empty(splits, n, d, dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):
        softmax_mean_kernel[*programs, splits](
            h, weight, bias, lse, mean, n, v, d, length,
            ROWS=row.rows, ITEMS=row.items, PRECISION=PRECISION, **constants,
        )  # fmt: skip
    return mean[0] if splits == 1 else mean.sum(dim=0)


def softmax_covariance(
    h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor, mean: Tensor
) -> Tensor:
    n, d = h.shape
    h, weight, bias, lse = (
        padded(h),
        padded(weight),
        kernel_input(bias),
        kernel_input(lse.float()),
    )
    row, constants = dot_settings("softmax_covariance", h, weight)
    del constants["DOT"]  # the logits of one row are no matrix product
    width, tiles = h.shape[1], constants["CHUNKS"]
    covariance = torch.empty(n, width, width, dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):
        softmax_covariance_kernel[n, tiles, tiles](
            h, weight, bias, lse, padded(mean.float()), covariance, weight.shape[0], width,
            ITEMS=row.items, PRECISION=PRECISION, **constants,
        )  # fmt: skip
    return covariance[:, :d, :d].contiguous()
