"""Triton kernel of `softmax_topk`: every range of items keeps its best, joined at the end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.ops.launch_table import PRECISION
from fisherkern.ops.softmax_moments_triton import mean_given_lse
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
def softmax_topk_kernel(
    h_ptr, w_ptr, bias_ptr, best_ptr, ids_ptr, lse_ptr, n, v, d, length, k,
    ROWS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    KEPT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """best, ids (n, splits, KEPT): the k largest logits of each range, unordered; lse (n, splits).

    Items come in ascending order and only a larger logit enters, so that among equal
    ones the lower ids stay. Unused places hold −inf and ids from v on.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    first = split * length
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    place = tl.arange(0, KEPT)
    # Places past k hold +inf: never the least, never replaced.
    empty = tl.where(place < k, float("-inf"), float("inf"))
    best = tl.zeros((ROWS, KEPT), tl.float32) + empty[None, :]
    ids = tl.zeros((ROWS, KEPT), tl.int32) + (v + place)[None, :]
    for start in range(first, first + tl.minimum(length, v - first), ITEMS):
        items = start + tl.arange(0, ITEMS)
        wide = items.to(tl.int64)
        z = logit_tile(h_ptr, w_ptr, rows, wide, n, v, d, WIDTH, CHUNKS, DOT, PRECISION)
        z = add_bias(z, bias_ptr, wide, v)
        highest, total = add_to_lse(z, highest, total)
        # An item's −inf is above an empty place's: it may be among the k.
        z = tl.where((items < v)[None, :], tl.maximum(z, -3.4028234663852886e38), z)
        least = tl.min(best, 1)
        entering = tl.sum((z > least[:, None]).to(tl.int32), 1)
        for _ in range(tl.minimum(tl.max(entering, 0), k)):
            top = tl.max(z, 1)
            item = tl.min(tl.where(z == top[:, None], items[None, :], v), 1)
            least = tl.min(best, 1)
            # Of the least the one with the highest id leaves; ids are distinct.
            leaving = tl.max(tl.where(best == least[:, None], ids, -1), 1)
            swap = (ids == leaving[:, None]) & (top > least)[:, None]  # (ROWS, KEPT)
            best = tl.where(swap, top[:, None], best)
            ids = tl.where(swap, item[:, None], ids)
            z = tl.where(items[None, :] == item[:, None], float("-inf"), z)
    split_row = rows * tl.num_programs(1) + split
    tl.store(lse_ptr + split_row, lse_of(highest, total), mask=rows < n)
    out = split_row[:, None] * KEPT + place[None, :]
    best = tl.where((place < k)[None, :], best, float("-inf"))
    tl.store(best_ptr + out, best, mask=(rows < n)[:, None])
    tl.store(ids_ptr + out, ids, mask=(rows < n)[:, None])


def softmax_topk(
    h: Tensor, weight: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Candidates (N, C), ids (N, C) int64 (none from V on), C >= k, lse (N,), w̄ (N, D)."""
    n, d = h.shape
    v = weight.shape[0]
    h, weight, bias = padded(h), padded(weight), kernel_input(bias)
    row, constants = dot_settings("softmax_topk", h, weight)
    programs, kept = triton.cdiv(n, row.rows), max(16, triton.next_power_of_2(k))
    splits, length = item_splits(v, row.items, programs)
    lse = torch.empty(n, splits, dtype=torch.float32, device=h.device)
    best = torch.empty(n, splits, kept, dtype=torch.float32, device=h.device)
    ids = torch.empty(n, splits, kept, dtype=torch.int32, device=h.device)
    with torch.cuda.device_of(h):
        softmax_topk_kernel[programs, splits](
            h, weight, bias, best, ids, lse, n, v, h.shape[1], length, k,
            ROWS=row.rows, ITEMS=row.items, KEPT=kept, PRECISION=PRECISION, **constants,
        )  # fmt: skip
    joined = torch.logsumexp(lse, dim=1)
    mean = mean_given_lse(h, weight, bias, joined)
    return best.flatten(1), ids.flatten(1).long(), joined, mean[:, :d].contiguous()
