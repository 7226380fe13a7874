"""Triton kernel of `segment_outer_square_`: a tile of F per program, its products in turn."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.ops.launch_table import PRECISION, TARGET_PROGRAMS
from fisherkern.ops.tiles_triton import SIZES, dot_settings, fp32_accumulator, padded


@triton.jit(do_not_specialize=SIZES)
def segment_outer_square_kernel(
    delta_ptr, inputs_ptr, squares_ptr, pairs, n, t, o, i, count,
    ROWS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """squares (splits, o, i): Σ (Σ_t δ_t a_tᵀ)² over each range of `count` probes and sequences.

    delta (pairs, t, o), the n sequences of each probe in turn, inputs (n, t, i); a tile is
    ROWS × ITEMS, WIDTH positions at once.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    split = tl.program_id(2)
    squares = tl.zeros((ROWS, ITEMS), tl.float32)
    for pair in range(split * count, tl.minimum((split + 1) * count, pairs)):
        first = (tl.zeros((), tl.int64) + pair) * t
        first_input = (tl.zeros((), tl.int64) + pair % n) * t
        product = tl.zeros((ROWS, ITEMS), tl.float32)
        for chunk in range(CHUNKS):
            position = chunk * WIDTH + tl.arange(0, WIDTH)
            valid = position < t
            place, input_place = first + position, first_input + position
            mask = (row < o)[:, None] & valid[None, :]
            d = tl.load(delta_ptr + place[None, :] * o + row[:, None], mask=mask, other=0.0)
            mask = valid[:, None] & (column < i)[None, :]
            a_ptr = inputs_ptr + input_place[:, None] * i + column[None, :]
            a = tl.load(a_ptr, mask=mask, other=0.0)
            product = tl.dot(d.to(DOT), a.to(DOT), product, input_precision=PRECISION)
        squares += product * product
    out = squares_ptr + (split.to(tl.int64) * o + row[:, None]) * i + column[None, :]
    tl.store(out, squares, mask=(row < o)[:, None] & (column < i)[None, :])


def segment_outer_square_(fisher: Tensor, delta: Tensor, inputs: Tensor) -> None:
    delta, inputs = padded(delta), padded(inputs)
    (probes, n, t, o), i = delta.shape, inputs.shape[2]
    pairs = probes * n
    row, constants = dot_settings("segment_outer_square_", delta[0, :, :, 0], inputs)
    programs = triton.cdiv(o, row.rows), triton.cdiv(i, row.items)
    splits = min(pairs, max(1, TARGET_PROGRAMS // (programs[0] * programs[1])))
    count = triton.cdiv(pairs, splits)
    splits = triton.cdiv(pairs, count)
    squares = torch.empty(splits, o, i, dtype=torch.float32, device=delta.device)
    with torch.cuda.device_of(delta), fp32_accumulator(fisher) as sums:
        segment_outer_square_kernel[*programs, splits](
            delta, inputs, squares, pairs, n, t, o, i, count,
            ROWS=row.rows, ITEMS=row.items, PRECISION=PRECISION, **constants,
        )  # fmt: skip
        assert sums is not None
        sums += squares[:, : fisher.shape[0], : fisher.shape[1]].sum(dim=0)
