"""Squared gradients of a table's rows, summed over (sequence, row) segments of lookups."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fisherkern.ops import _extension
from fisherkern.ops.backend import on_gpu
from fisherkern.ops.launch_table import lookup_splits
from fisherkern.ops.library import register_op
from fisherkern.ops.products import add_rows_

# Elements of the gradients that a GPU works on at once: 256 MB in fp32, three times over.
_BLOCK_ELEMENTS = 2**26


class LookupSegments(NamedTuple):
    """The lookups of a batch sorted by (row, sequence); a segment is one such pair.

    order (P,): positions n·T + t, segment by segment; segment_start (U + 1,): where each
    begins in `order`; row (U,) and sequence (U,) of each; row_start (G + 1,): where the
    segments of each row that occurs begin. All int64. On a GPU P is N·T, positions without
    a lookup last, and U and G are P as well: segments and rows beyond those that occur are
    empty, their `row` -1, so that nobody waits for the number of either.
    """

    order: Tensor
    segment_start: Tensor
    row: Tensor
    sequence: Tensor
    row_start: Tensor


def lookup_segments(ids: Tensor) -> LookupSegments:
    """Sort lookups by (row, sequence) into segments.

    Equal pairs keep the order of their positions, so that sums repeat bit for bit.

    Args:
        ids: (N, T) int64 row ids; -1 is no lookup and is left out.

    Returns:
        The segments, int64 on the device of ids.
    """
    found = _padded_segments(ids)
    if on_gpu(ids):
        return found
    segments = int((found.row >= 0).sum())
    rows = int((found.row_start.diff() > 0).sum())
    return LookupSegments(
        found.order[: int(found.segment_start[-1])],
        found.segment_start[: segments + 1],
        found.row[:segments],
        found.sequence[:segments],
        found.row_start[: rows + 1],
    )


def _padded_segments(ids: Tensor) -> LookupSegments:
    """`lookup_segments` with as many segments and rows as positions; waits for no GPU."""
    n, positions = len(ids), ids.numel()
    numbers = torch.arange(positions + 1, device=ids.device)
    keys = ids * n + torch.arange(n, device=ids.device)[:, None]
    none = torch.iinfo(torch.int64).max
    keys, order = keys.masked_fill(ids < 0, none).flatten().sort(stable=True)
    segment = _numbered(keys, none)
    segment_start = torch.searchsorted(segment, numbers)
    # Past the last segment this reads a position of it, or one without a lookup.
    key = keys[segment_start[:-1].clamp(max=max(positions - 1, 0))]
    occurs = segment_start.diff() > 0
    row = torch.where(occurs, key // max(n, 1), -1)
    group = _numbered(torch.where(occurs, row, none), none)
    sequence = torch.where(occurs, key % max(n, 1), 0)
    return LookupSegments(order, segment_start, row, sequence, torch.searchsorted(group, numbers))


def _numbered(keys: Tensor, none: int) -> Tensor:
    """0, 1, 2, … for the runs of equal ascending keys (P,); P for the keys that are `none`."""
    begins = torch.ones_like(keys, dtype=torch.bool)
    begins[1:] = keys[1:] != keys[:-1]
    return (begins.cumsum(0) - 1).masked_fill_(keys == none, len(keys))


@register_op(mutates=("fisher",))
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
    extension = _extension.extension_for("lookup_square_", fisher, delta, beta, hidden, **sizes)
    if extension is not None:
        split = _extension.LaunchSplit(lookup_splits(len(delta))) if fisher.is_cuda else None
        _extension.lookup_square_(
            extension, fisher, delta, *indices, beta, hidden, sequence, split=split
        )
    elif on_gpu(fisher):
        _add_blocks_(fisher, delta, order, segment_start, row, beta, hidden, sequence)
    else:
        _add_probes_(fisher, delta, order, segment_start, row, beta, hidden, sequence)


def _add_probes_(
    fisher: Tensor,
    delta: Tensor,
    order: Tensor,
    segment_start: Tensor,
    row: Tensor,
    beta: Tensor | None,
    hidden: Tensor | None,
    sequence: Tensor | None,
) -> None:
    """One probe at a time, which is what a CPU's caches want; in a fixed order there."""
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


def _add_blocks_(
    fisher: Tensor,
    delta: Tensor,
    order: Tensor,
    segment_start: Tensor,
    row: Tensor,
    beta: Tensor | None,
    hidden: Tensor | None,
    sequence: Tensor | None,
) -> None:
    """Many probes at a time: a launch for all of them, no atomics, nothing waited for."""
    width = delta.shape[2]
    block = max(1, _BLOCK_ELEMENTS // max(1, delta[0].numel()))
    total = fisher.new_zeros(len(row), width)
    for first in range(0, len(delta), block):
        part = delta[first : first + block].to(fisher.dtype)
        given = part.permute(1, 0, 2).index_select(0, order)
        sums = torch.segment_reduce(given, "sum", offsets=segment_start, axis=0, unsafe=True)
        if beta is None:
            total += sums.square_().sum(dim=1)
            continue
        assert hidden is not None and sequence is not None
        h = hidden.to(fisher.dtype).index_select(0, sequence)
        crossed = beta[:, first : first + block, None].to(fisher.dtype) * h[:, None]
        total += crossed.add_(sums).mul_(sums).sum(dim=1)
    add_rows_(fisher, row.clamp(min=0), total)


def lookup_square_(
    fisher: Tensor,
    delta: Tensor,
    segments: LookupSegments,
    beta: Tensor | None = None,
    hidden: Tensor | None = None,
) -> None:
    """Add the squared gradients of an embedding's rows, duplicates in a sequence summed first.

        fisher[row_u] += Σ_r S_ru ∘ (S_ru + β_ur h_{n(u)}),   S_ru = Σ_{m in segment u} δ_rm

    A segment is the lookups of one row by one sequence. In PyTorch holds (U, D) of one probe at a
    time, on a GPU three times a block of probes' gradients; in the extension (G, D), or
    (splits, G, D) on a GPU, where one CTA owns a row and no atomics are needed.

    Args:
        fisher: (V, D), added to; sums are in its dtype.
        delta: (R, N·T, D), gradients of R probes at the lookup's output.
        segments: From `lookup_segments`.
        beta: (U, R), coefficients of the cross term with a tied output layer; None without one.
        hidden: (N, D), given with beta: h above; twice the hidden states for the Fisher's term.

    Source: design section 1, tied embedding.
    """
    order, segment_start, row, sequence, row_start = segments
    rest = beta, hidden, None if beta is None else sequence
    if on_gpu(fisher):
        _lookup_square_(fisher, delta, order, segment_start, row, row_start, *rest)
        return
    # A row that every sequence looks up gets thousands of squares, each of which would be rounded
    # to the units of all that came before it: they are added up from 0, and then added.
    number = torch.repeat_interleave(row_start.diff(), output_size=len(row))
    own = fisher.new_zeros(len(row_start) - 1, fisher.shape[1])
    _lookup_square_(own, delta, order, segment_start, number, row_start, *rest)
    add_rows_(fisher, row[row_start[:-1]], own)


def lookup_square_reference(
    shape: tuple[int, int],
    delta: Tensor,
    ids: Tensor,
    beta: dict[tuple[int, int], list[float]] | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Compute the fp64 twin: a loop over probes, sequences and positions; (V, D).

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
