"""The ops in float64 by closed forms, in tiles and on the inputs' own device.

The package's own twins loop over items or hold N·V·D numbers: right for small catalogues, and
hours for large ones. tests/test_gpu_day.py holds these to those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fisherkern.ops import LookupSegments, counter_rng
from fisherkern.ops.softmax_lse import RANGE

# Numbers of one tile (N, items): 256 MB in fp64.
TILE = 2**25


class Softmax:
    """softmax(h Wᵀ + b) in fp64; h (N, D), weight (V, D), bias (V,) or None."""

    def __init__(
        self, h: Tensor, weight: Tensor, bias: Tensor | None, tile: int | None = None
    ) -> None:
        self.h, self.weight, self.bias = h.double(), weight, bias
        step = tile or max(1, TILE // max(1, len(h)) // RANGE) * RANGE
        starts = range(0, len(weight), step)
        self.tiles = [slice(start, min(start + step, len(weight))) for start in starts]
        self.lse = torch.stack([self.logits(s).logsumexp(1) for s in self.tiles], 1).logsumexp(1)

    def logits(self, items: slice) -> Tensor:
        z = self.h @ self.weight[items].double().T
        return z if self.bias is None else z + self.bias[items].double()

    def each(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(items, their p (N, C), their vectors (C, D)) of every tile."""
        for items in self.tiles:
            p = (self.logits(items) - self.lse[:, None]).exp()
            yield items, p, self.weight[items].double()

    def mean(self) -> Tensor:
        total = torch.zeros_like(self.h)
        for _, p, w in self.each():
            total += p @ w
        return total

    def ranges(self) -> Tensor:
        """The log-sum-exp of every RANGE items; tiles are whole ranges."""
        parts = [part.logsumexp(1) for s in self.tiles for part in self.logits(s).split(RANGE, 1)]
        return torch.stack(parts, dim=1)

    def covariance(self) -> Tensor:
        mean, width = self.mean(), self.weight.shape[1]
        total = self.h.new_zeros(len(self.h), width, width)
        for _, p, w in self.each():
            for n, row in enumerate(p):  # centred vectors of one row at a time
                centred = w - mean[n]
                total[n] += (centred * row[:, None]).T @ centred
        return total

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """(p, ids) of the k most likely items, the lower id first among equal ones."""
        z = torch.cat([self.logits(items) for items in self.tiles], dim=1)
        values, ids = torch.sort(z, dim=1, descending=True, stable=True)
        return (values[:, :k] - self.lse[:, None]).exp(), ids[:, :k]

    def top(self, k: int) -> Tensor:
        """p of the k most likely items, (N, k), a tile at a time."""
        best = self.h.new_empty(len(self.h), 0)
        for _, p, _w in self.each():
            both = torch.cat((best, p), dim=1)
            best = both.topk(min(k, both.shape[1]), dim=1).values
        return best

    def head(self, ids: Tensor | None = None, omega: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Σ_n of the squared gradients of (weight (V, D), bias (V,)): `ops.head_sqgrad_`."""
        squares = self.h.square()
        weight, bias = [], []
        share = None if omega is None else omega.double().sum(1)
        for _, p, _w in self.each():
            c = p * (1 - p) if share is None else share[:, None] * p.square()
            weight.append(c.T @ squares)
            bias.append(c.sum(0))
        total, total_bias = torch.cat(weight), torch.cat(bias)
        if ids is not None and omega is not None:
            z = torch.einsum("nd,nkd->nk", self.h, self.weight[ids].double())
            z = z if self.bias is None else z + self.bias[ids].double()
            c = omega.double() * (1 - 2 * (z - self.lse[:, None]).exp())
            terms = c[:, :, None] * squares[:, None]
            total.index_add_(0, ids.flatten(), terms.flatten(0, 1))
            total_bias.index_add_(0, ids.flatten(), c.flatten())
        return total, total_bias

    def sketch(self, rows: Tensor, probes: int, seed: int) -> tuple[Tensor, Tensor]:
        """(u (N, R, D), totals (N, R)) of `ops.softmax_sketch`."""
        sums = self.h.new_zeros(len(self.h), probes, self.weight.shape[1])
        totals = self.h.new_zeros(len(self.h), probes)
        for items, p, w in self.each():
            number = torch.arange(items.start, items.stop, device=p.device)
            row, item = torch.broadcast_tensors(rows[:, None], number[None])
            signed = p.sqrt() * counter_rng.random_signs_at(seed, row, item, p.dtype)
            bucket = counter_rng.bucket_of(seed, number, probes)
            for r in range(probes):
                own = signed * (bucket == r)
                sums[:, r] += own @ w
                totals[:, r] += own.sum(1)
        return sums - totals[:, :, None] * self.mean()[:, None], totals


def segments(delta: Tensor, inputs: Tensor, offsets: Sequence[int]) -> Tensor:
    """Σ_r Σ_n (Σ_{t in n} δ_rt a_tᵀ)², (O, I): delta (R, M, O), inputs (M, I), N + 1 offsets."""
    total = delta.new_zeros(delta.shape[2], inputs.shape[1], dtype=torch.float64)
    for start, stop in zip(offsets, offsets[1:], strict=False):
        d, a = delta[:, start:stop].double(), inputs[start:stop].double()
        total += (d.transpose(1, 2) @ a).square().sum(0)
    return total


def lookups(
    rows: int,
    delta: Tensor,
    given: LookupSegments,
    beta: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """`ops.lookup_square_` into zeros (rows, D), from the sums S_ru held at once."""
    count = len(given.row)
    segment = torch.repeat_interleave(
        torch.arange(count, device=delta.device), given.segment_start.diff()
    )
    sums = delta.new_zeros(len(delta), count, delta.shape[2], dtype=torch.float64)
    # On a GPU positions without a lookup come last, and segments that are none have row -1.
    sums.index_add_(1, segment, delta[:, given.order[: len(segment)]].double())
    squares = sums.square()
    if beta is not None and hidden is not None:
        cross = beta.double().T[:, :, None] * hidden.double()[given.sequence]
        squares += sums * cross
    total = delta.new_zeros(rows, delta.shape[2], dtype=torch.float64)
    return total.index_add_(0, given.row.clamp(min=0), squares.sum(0))
