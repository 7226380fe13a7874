"""The output layer's W and b by rows over several processes: sums and choices joined.

Every process calls the same methods with the same hidden states, works on its own items, and has
the joined result. What goes from one process to another is by sequence: numbers, vectors of D,
a D×D matrix for the covariance, K candidates; nothing by item.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fisherkern import ops
from fisherkern.fisher.factors.item_table import ItemTable, ItemTile
from fisherkern.fisher.sharded.draws import distinct_items, every_item
from fisherkern.ops import counter_rng
from fisherkern.ops.head_sqgrad import add_square_of_items_
from fisherkern.ops.sample_items import items_at, row_blocks
from fisherkern.ops.softmax_lse import RANGE, chosen_range, logit_tiles, num_ranges
from fisherkern.ops.softmax_moments import second_moment
from fisherkern.ops.softmax_sketch import sketch_sums
from fisherkern.ops.softmax_topk import ordered_items
from fisherkern.processes import joined_sum, rank, stacked

# Pieces of a process's items: up to the first whole range, and from there on.
_PIECES = 2


@dataclasses.dataclass(frozen=True)
class ItemPiece:
    """Neighbouring items `first` + 0 … n − 1 of this process: vectors (n, D) and biases (n,).

    `place` says where they are among the process's own, `ranges` the same of its ranges.
    """

    first: int
    weight: Tensor
    bias: Tensor | None
    place: slice
    ranges: slice

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """Vectors and biases, as ops take them."""
        return self.weight, self.bias


def pieces_of(first: int, weight: Tensor, bias: Tensor | None) -> list[ItemPiece]:
    """Return the process's items from `first` on, cut as the whole table's ranges are.

    Draws without replacement are keyed by range.
    """
    lead = min(-first % RANGE, len(weight))
    pieces = []
    for start, stop in ((0, lead), (lead, len(weight))):
        if stop > start:
            place, begin = slice(start, stop), num_ranges(lead) if start else 0
            own = None if bias is None else bias[place]
            ranges = slice(begin, begin + num_ranges(stop - start))
            pieces.append(ItemPiece(first + start, weight[place], own, place, ranges))
    return pieces


class ShardedItemTable(ItemTable):
    """`ItemTable` of V = `num_items` rows, of which this process has those from `first` on.

    weight (n, D), n perhaps 0, and bias (n,) or None are the process's own. The shares of the
    processes are in their order. `looked_up` (U,): the items that the rows at hand of the table
    that is looked up are, numbers outside 0 … V − 1 for no items.
    """

    def __init__(
        self,
        num_items: int,
        first: int,
        weight: Tensor,
        bias: Tensor | None,
        looked_up: Tensor | None = None,
    ) -> None:
        super().__init__(weight, bias)
        self.first = first
        self.pieces = pieces_of(first, weight, bias)
        self._num_items = num_items
        self._looked_up = looked_up
        # Items at hand, ascending, and their rows.
        self._known = torch.empty(0, dtype=torch.int64, device=weight.device)
        self._vectors = weight[:0]
        self._biases = None if bias is None else bias[:0]

    @property
    def num_items(self) -> int:
        """V of all processes together."""
        return self._num_items

    def _by_piece(self, values: Sequence[Tensor], missing: Tensor) -> Tensor:
        """Return a value of each piece of all processes, (2 P, ...); `missing` for none."""
        padded = [*values, *[missing] * (_PIECES - len(values))]
        return stacked(torch.stack(padded)).flatten(0, 1)

    def _joined_mean(
        self, h: Tensor, found: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return the lse and w̄ over all pieces, of (lse, w̄) over each."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        nothing = torch.full((len(h),), -torch.inf, dtype=torch.float64, device=h.device)
        every = self._by_piece([lse.double() for lse, _ in found], nothing)
        lse = every.logsumexp(dim=0)
        mean = torch.zeros(len(h), self.weight.shape[1], dtype=dtype, device=h.device)
        for own, part in found:
            share = (own.double() - lse).exp()[:, None].to(dtype)
            # A piece of impossible items has no mean.
            mean += torch.where(share == 0, 0.0, share * part)
        return lse.to(dtype), joined_sum(mean)

    def mean(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the joined lse and w̄, and the log-sum-exps of this process's ranges."""
        found = [ops.softmax_mean(h, *piece.inputs) for piece in self.pieces]
        none = torch.empty(len(h), 0, dtype=torch.float64, device=h.device)
        ranges = torch.cat([none, *(part for _, _, part in found)], dim=1)
        return *self._joined_mean(h, [(lse, mean) for lse, mean, _ in found]), ranges

    def largest(self, ranges: Tensor) -> Tensor:
        """Return the largest log-sum-exp of a range of all processes, (N,)."""
        nothing = ranges.new_full((len(ranges), 1), -torch.inf)
        return stacked(torch.cat([nothing, ranges], dim=1).amax(dim=1)).amax(dim=0)

    def topk(self, h: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `ItemTable.topk`; k candidates come from every process."""
        found = [ops.softmax_topk(h, *own.inputs, min(k, len(own.weight))) for own in self.pieces]
        lse, mean = self._joined_mean(h, [(own, mean) for _, _, own, mean in found])
        # Less likely than every item.
        p = torch.full((len(h), k), -1.0, dtype=lse.dtype, device=h.device)
        ids = torch.full((len(h), k), self.num_items, device=h.device)
        for piece, (share, places, own, _) in zip(self.pieces, found, strict=True):
            part = (own - lse).exp()[:, None]
            # A piece of impossible items has no softmax.
            share = torch.where(part == 0, 0.0, share * part)
            p, ids = torch.cat([p, share], dim=1), torch.cat([ids, places + piece.first], dim=1)
        p, ids = (part[:, :k].contiguous() for part in ordered_items(p, ids))
        p, ids = (stacked(part).transpose(0, 1).flatten(1) for part in (p, ids))
        p, ids = ordered_items(p, ids)
        return p[:, :k], ids[:, :k], lse, mean

    def covariance(self, h: Tensor, lse: Tensor, mean: Tensor) -> Tensor:
        """As `ItemTable.covariance`."""
        centre = mean.mean(dim=0)
        moment = lse.new_zeros(*mean.shape, mean.shape[1])
        for piece in self.pieces:
            moment += second_moment(h, *piece.inputs, lse, centre)
        offset = mean - centre
        return joined_sum(moment).sub_(offset[:, :, None] * offset[:, None])

    def sketch(
        self, h: Tensor, lse: Tensor, mean: Tensor, rows: Tensor, probes: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """As `ItemTable.sketch`."""
        sums = lse.new_zeros(len(h), probes, mean.shape[1])
        totals = lse.new_zeros(len(h), probes)
        for piece in self.pieces:
            own = sketch_sums(h, *piece.inputs, lse, rows, probes, seed, piece.first)
            sums += own[0]
            totals += own[1]
        sums, totals = joined_sum(sums), joined_sum(totals)
        return sums.sub_(totals[:, :, None] * mean[:, None]), totals

    def draw(
        self, h: Tensor, lse: Tensor, ranges: Tensor, rows: Tensor, k: int, seed: int
    ) -> Tensor:
        """As `ItemTable.draw`: first the piece of a process, then there the item."""
        nothing = torch.full((len(h),), -torch.inf, dtype=torch.float64, device=h.device)
        masses = [ranges[:, piece.ranges].logsumexp(dim=1) for piece in self.pieces]
        mass = (self._by_piece(masses, nothing) - lse.double()).exp().t()
        total = mass.cumsum(dim=1)
        u = counter_rng.uniform(seed, rows, torch.arange(k, device=h.device))
        part, _ = chosen_range(total, u)
        # Where rounding leaves u above the whole sum: the last piece that has a possible item.
        number = torch.arange(mass.shape[1], device=h.device)
        part = part.minimum(number.masked_fill(mass == 0, 0).amax(dim=1, keepdim=True))
        below = torch.where(part > 0, total.gather(1, (part - 1).clamp(min=0)), 0.0)
        ids = torch.zeros_like(part)
        for number_of_piece, piece in enumerate(self.pieces, start=_PIECES * rank()):
            row, column = (part == number_of_piece).nonzero().unbind(1)
            own = ranges[:, piece.ranges]
            for few in row_blocks(len(row), own.shape[1]):
                n, j = row[few], column[few]
                inside = (u[n, j] - below[n, j])[:, None]
                items = items_at(inside, h[n], *piece.inputs, lse[n], own[n])
                ids[n, j] = items[:, 0] + piece.first
        return joined_sum(ids)

    def draw_distinct(
        self, h: Tensor, lse: Tensor, ranges: Tensor, rows: Tensor, k: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """As `ItemTable.draw_distinct`."""
        if k == self.num_items:
            return every_item(self, h, lse)
        return distinct_items(self, h, lse, ranges, rows, k, seed)

    def add_square_(
        self,
        sums: Sequence[Tensor | None],
        h: Tensor,
        lse: Tensor,
        ids: Tensor | None,
        omega: Tensor | None,
    ) -> None:
        """Add the squared gradients of this process's rows to their sums, (n, D) and (n,)."""
        for piece in self.pieces:
            own = [None if total is None else total[piece.place] for total in sums]
            if ids is None or omega is None:
                ops.head_sqgrad_(own[0], own[1], h, *piece.inputs, lse)
                continue
            places = ids - piece.first
            places = places.masked_fill((places < 0) | (places >= len(piece.weight)), -1)
            add_square_of_items_(own[0], own[1], h, *piece.inputs, lse, places, omega)

    def most_likely(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """As `ItemTable.most_likely`."""
        item, highest = super().most_likely(h)
        items, values = stacked(item), stacked(highest)
        item, highest = items[0], values[0]
        # In the order of the processes: of equal items the first.
        for other, value in zip(items[1:], values[1:], strict=True):
            item = torch.where(value > highest, other, item)
            highest = torch.maximum(highest, value)
        return item, highest

    def tiles(self, h: Tensor) -> Iterator[ItemTile]:
        """Yield the logits of this process's items."""
        for piece in self.pieces:
            for start, stop, z in logit_tiles(h, *piece.inputs):
                place = slice(piece.place.start + start, piece.place.start + stop)
                yield ItemTile(piece.first + start, z, piece.weight[start:stop], place)

    def columns(self, rows: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """As `ItemTable.columns`; `rows` are places among the rows at hand."""
        assert self._looked_up is not None
        items, none = super().columns(self._looked_up[rows.clamp(min=0)], 0)
        none = none | (rows < 0)
        return items.masked_fill(none, 0), none

    def joined(self, sums: Tensor) -> Tensor:
        """Return the sum over the processes."""
        return joined_sum(sums)

    def fetch(self, items: Tensor) -> None:
        """Have the rows of some items, the same in all processes, from those that own them."""
        items = items.unique()
        items = items[~torch.isin(items, self._known)]
        if not len(items):
            return
        own = (items >= self.first) & (items < self.first + len(self.weight))
        places = items[own] - self.first
        vectors = self.weight.new_zeros(len(items), self.weight.shape[1])
        vectors[own] = self.weight[places]
        known, order = torch.cat([self._known, items]).sort()
        self._vectors = torch.cat([self._vectors, joined_sum(vectors)])[order]
        if self.bias is not None and self._biases is not None:
            biases = self.bias.new_zeros(len(items))
            biases[own] = self.bias[places]
            self._biases = torch.cat([self._biases, joined_sum(biases)])[order]
        self._known = known

    def rows(self, items: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the vectors and biases of items that were fetched."""
        place = torch.searchsorted(self._known, items.contiguous()).clamp(
            max=max(len(self._known) - 1, 0)
        )
        if items.numel() and not bool((self._known[place] == items).all()):
            raise RuntimeError("rows of a sharded table are asked for that nobody fetched")
        return self._vectors[place], None if self._biases is None else self._biases[place]

    def add_rows_(self, sums: Tensor, items: Tensor, values: Tensor) -> None:
        """As `ItemTable.add_rows_`, of this process's items alone."""
        own = (items >= self.first) & (items < self.first + len(self.weight))
        super().add_rows_(sums, items[own] - self.first, values[own])
