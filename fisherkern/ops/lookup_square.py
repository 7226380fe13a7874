"""Squared gradients of a table's rows, summed over (sequence, row) segments of lookups."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fisherkern.ops import _extension
from fisherkern.ops._library import no_outputs, register
from fisherkern.ops.launch_table import lookup_splits


class LookupSegments(NamedTuple):
    """The lookups of a batch sorted by (row, sequence); a segment is one such pair.

    order (P,): positions n·T + t, segment by segment; segment_start (U + 1,): where each
    begins in `order`; row (U,) and sequence (U,) of each; row_start (G + 1,): where the
    segments of each row that occurs begin. All int64.
    """

    order: Tensor
    segment_start: Tensor
    row: Tensor
    sequence: Tensor
    row_start: Tensor


def lookup_segments(ids: Tensor) -> LookupSegments:
    """Sort (N, T) int64 row ids into segments; -1 is no lookup and is left out.

    Equal pairs keep the order of their positions, so that sums repeat bit for bit.
    """
    n, positions = ids.shape
    sequence = torch.arange(n, device=ids.device)[:, None]
    keys, order = (ids * n + sequence).flatten().sort(stable=True)
    # A padded id sorts before every other, its key being negative.
    order, keys = order[keys >= 0], keys[keys >= 0]
    pair, lengths = torch.unique_consecutive(keys, return_counts=True)
    row = pair // max(n, 1)
    _, segments = torch.unique_consecutive(row, return_counts=True)
    return LookupSegments(order, _starts(lengths), row, pair % max(n, 1), _starts(segments))


def _starts(lengths: Tensor) -> Tensor:
    """0 and the running sums: (U,) -> (U + 1,)."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _lookup_square_(
    fisher: Tensor,
    delta: Tensor,
    order: Tensor,
    segment_start: Tensor,
    row: Tensor,
    row_start: Tensor,
    beta: Tensor | None,
    hidden: Tensor | None,
    sequence: Tensor | None,
) -> None:
    indices = (order, segment_start, row, row_start)
    sizes = {"width": fisher.shape[1], "size": delta.numel()}
    extension = _extension.serving("lookup_square_", fisher, delta, beta, hidden, **sizes)
    if extension is not None:
        split = _extension.Split(lookup_splits(len(delta))) if fisher.is_cuda else None
        _extension.lookup_square_(
            extension, fisher, delta, *indices, beta, hidden, sequence, split=split
        )
        return
    count = len(row)
    # Position -> segment; positions of no segment add to one more, which is dropped.
    segment = torch.full((delta.shape[1],), count, device=row.device)
    segment[order] = torch.repeat_interleave(segment_start.diff(), output_size=len(order))
    for r, d in enumerate(delta):
        sums = fisher.new_zeros(count + 1, d.shape[1])
        sums = sums.index_add_(0, segment, d.to(fisher.dtype))[:-1]
        if beta is None:
            # In place: a fresh (U, D) costs more than the arithmetic.
            sums.square_()
        else:
            assert hidden is not None and sequence is not None
            h = hidden.to(fisher.dtype).index_select(0, sequence)
            sums *= h.mul_(beta[:, r : r + 1]).add_(sums)
        fisher.index_add_(0, row, sums)


_op = register(
    "lookup_square_(Tensor(a!) fisher, Tensor delta, Tensor order, Tensor segment_start,"
    " Tensor row, Tensor row_start, Tensor? beta, Tensor? hidden, Tensor? sequence) -> ()",
    _lookup_square_,
    no_outputs,
)


def lookup_square_(
    fisher: Tensor,
    delta: Tensor,
    segments: LookupSegments,
    beta: Tensor | None = None,
    hidden: Tensor | None = None,
) -> None:
    """fisher[row_u] += Σ_r S_ru ∘ (S_ru + β_ur h_{n(u)}), S_ru = Σ_{m in segment u} δ_rm.

    fisher (V, D); delta (R, M, D): the gradients at the lookup's output, M = N·T
    positions; `segments` from `lookup_segments`; beta (U, R) and hidden (N, D): the
    cross term with the tied output layer (twice β h, in the letters of design section
    1), None without one. Accumulates in fisher's dtype. Duplicates of a row within a
    sequence are summed before the square. In PyTorch holds (U, D) of one probe at a
    time. In fp32 and bf16 the extension, where it was built, serves the CPU and covered
    GPUs; it holds nothing, or (splits, G, D) on a GPU, where one CTA owns a row and no
    atomics are needed. Design section 1, tied embedding.
    """
    indices = (segments.order, segments.segment_start, segments.row, segments.row_start)
    sequence = None if beta is None else segments.sequence
    _op(fisher, delta, *indices, beta, hidden, sequence)


def lookup_square_reference(
    shape: tuple[int, int],
    delta: Tensor,
    ids: Tensor,
    beta: dict[tuple[int, int], list[float]] | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """The fp64 twin: a loop over probes, sequences and positions; (V, D).

    delta (R, N·T, D), ids (N, T); beta gives the R coefficients of (sequence, row).
    """
    total = torch.zeros(shape, dtype=torch.float64)
    n, positions = ids.shape
    for r, gradient in enumerate(delta.double().view(len(delta), n, positions, shape[1])):
        for i in range(n):
            sums: dict[int, Tensor] = {}
            for t in range(positions):
                row = int(ids[i, t])
                if row >= 0:
                    sums[row] = sums.get(row, torch.zeros(shape[1]).double()) + gradient[i, t]
            for row, s in sums.items():
                total[row] += s.square()
                if beta is not None and hidden is not None:
                    total[row] += beta[i, row][r] * hidden[i].double() * s
    return total
