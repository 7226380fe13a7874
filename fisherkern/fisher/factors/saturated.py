"""Softmaxes in which one item has nearly all the mass, without differences that cancel.

For the most likely item t of such a sequence 1 − p_t = Σ_{v≠t} p_v, and with
δ = Σ_{v≠t} p_v (w_v − w_t) the mean is w̄ = w_t + δ and the covariance
C = Σ_{v≠t} p_v (w_v − w_t)(w_v − w_t)ᵀ − δ δᵀ: sums of what is left, in fp64.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fisherkern.fisher.factors.item_table import ItemTable
from fisherkern.ops import counter_rng


@dataclasses.dataclass(frozen=True)
class SaturatedRows:
    """The saturated ones of N softmaxes, in fp64.

    rows (M,): which; item (M,): their most likely items t; rest (M,): 1 − p_t; lse (M,);
    offset (M, D): w̄ − w_t; place (N,): each row's number among the M, −1 for none.
    h (M, D), table: as of the softmaxes.
    """

    rows: Tensor
    item: Tensor
    rest: Tensor
    lse: Tensor
    offset: Tensor
    place: Tensor
    h: Tensor
    table: ItemTable

    @staticmethod
    def among(
        h: Tensor, table: ItemTable, most: Tensor, dtype: torch.dtype
    ) -> SaturatedRows | None:
        """Those of rows h (N, D) that have at most a share of some thousandths left, in fp64 0.02.

        most (N,): an upper bound of the largest probability; a row that it allows costs two
        passes over the items. Below the limit 1 − p has lost a third of its digits in fp32; in fp64
        the limit leaves (1 − p)² twelve.
        """
        limit = 0.02 if dtype == torch.float64 else torch.finfo(dtype).eps ** (1 / 3)
        rows = (most > 1 - limit).nonzero()[:, 0]
        if not len(rows) or table.num_items < 2:
            return None
        own = h[rows].double()
        item, highest = table.most_likely(own)
        table.fetch(item)
        top = table.rows(item)[0].double()
        odds, offset = torch.zeros_like(highest), torch.zeros_like(own)
        for tile in table.tiles(own):
            e = _without(tile.z.sub_(highest[:, None]).exp_(), item - tile.first)
            share = e.sum(dim=1)
            odds += share
            offset += e @ tile.vectors.double() - share[:, None] * top
        odds, offset = table.joined(odds), table.joined(offset)
        saturated = odds <= limit
        rows, item, odds = rows[saturated], item[saturated], odds[saturated]
        if not len(rows):
            return None
        place = torch.full((len(h),), -1, device=h.device)
        place[rows] = torch.arange(len(rows), device=h.device)
        return SaturatedRows(
            rows, item, odds / (1 + odds), highest[saturated] + odds.log1p(),
            offset[saturated] / (1 + odds)[:, None], place, own[saturated], table,
        )  # fmt: skip

    def covariance(self) -> Tensor:
        """C of the saturated rows, (M, D, D)."""
        found = self.offset.new_zeros(*self.offset.shape, self.offset.shape[1])
        tops = self.table.rows(self.item)[0].double()
        for tile in self.table.tiles(self.h):
            p = _without(tile.z.sub_(self.lse[:, None]).exp_(), self.item - tile.first)
            items = tile.vectors.double()
            for row, top in enumerate(tops):
                centred = items - top
                found[row] += (p[row, :, None] * centred).T @ centred
        return self.table.joined(found) - self.offset[:, :, None] * self.offset[:, None]

    def sketch(self, sequence_ids: Tensor, probes: int, seed: int) -> tuple[Tensor, Tensor]:
        """u (M, R, D) of `ops.softmax_sketch`, and its sums without the items t, (M, R)."""
        ids = sequence_ids[self.rows]
        u = self.offset.new_zeros(len(ids), probes, self.h.shape[1])
        others = self.offset.new_zeros(len(ids), probes)
        tops = self.table.rows(self.item)[0].double()
        for tile in self.table.tiles(self.h):
            items = torch.arange(tile.first, tile.first + tile.z.shape[1], device=u.device)
            root = _without(tile.z.sub_(self.lse[:, None]).mul_(0.5).exp_(), self.item - tile.first)
            signed = root * _signs(seed, ids[:, None], items[None])
            dealing = torch.nn.functional.one_hot(
                counter_rng.bucket_of(seed, items, probes), probes
            )
            dealing = dealing.to(signed.dtype)
            others += signed @ dealing
            vectors = tile.vectors.double()
            for row, top in enumerate(tops):
                u[row] += (signed[row, :, None] * dealing).T @ (vectors - top)
        u, others = self.table.joined(u), self.table.joined(others)
        totals = others.scatter_add(
            1,
            counter_rng.bucket_of(seed, self.item, probes)[:, None],
            ((1 - self.rest).sqrt() * _signs(seed, ids, self.item))[:, None],
        )
        return u - totals[:, :, None] * self.offset[:, None], others

    def select(self, keep: Tensor) -> SaturatedRows:
        """Those of them that are in keep (N,) bool."""
        own = keep[self.rows]
        fields = {name: getattr(self, name)[own] for name in ("rows", "item", "rest", "lse")}
        place = torch.full_like(self.place, -1)
        place[self.rows[own]] = torch.arange(int(own.sum()), device=place.device)
        return dataclasses.replace(
            self, **fields, offset=self.offset[own], h=self.h[own], place=place
        )

    def add_output_(
        self,
        weight_fisher: Tensor | None,
        bias_fisher: Tensor | None,
        ids: Tensor | None,
        omega: Tensor | None,
    ) -> None:
        """`ops.head_sqgrad_` of these rows; ids and omega (N, K) of all."""
        top = self.rest * (1 - self.rest)
        if ids is not None and omega is not None:
            ids, omega = ids[self.rows], omega[self.rows].double()
            hit = ids == self.item[:, None]
            others = omega.masked_fill(hit, 0.0)
            at_top = omega.masked_fill(~hit, 0.0).sum(dim=1)
            top = (1 - self.rest).square() * others.sum(dim=1) + at_top * self.rest.square()
            vectors, bias = self.table.rows(ids)
            z = (self.h[:, None] * vectors.double()).sum(dim=2)
            if bias is not None:
                z += bias
            sparse = others * (1 - 2 * (z - self.lse[:, None]).exp())
            self._add_rows_(weight_fisher, bias_fisher, ids, sparse)
        self._add_rows_(weight_fisher, bias_fisher, self.item[:, None], top[:, None])
        squared = self.h.square()
        for tile in self.table.tiles(self.h):
            p = _without(tile.z.sub_(self.lse[:, None]).exp_(), self.item - tile.first)
            share = p - p.square() if omega is None else omega.sum(dim=1)[:, None] * p.square()
            if weight_fisher is not None:
                weight_fisher[tile.place] += (share.T @ squared).to(weight_fisher.dtype)
            if bias_fisher is not None:
                bias_fisher[tile.place] += share.sum(dim=0).to(bias_fisher.dtype)

    def _add_rows_(
        self,
        weight_fisher: Tensor | None,
        bias_fisher: Tensor | None,
        items: Tensor,
        coefficient: Tensor,
    ) -> None:
        """Add coefficients (M, m) of items (M, m), times h² for the weight."""
        if weight_fisher is not None:
            terms = coefficient[:, :, None] * self.h.square()[:, None]
            self.table.add_rows_(weight_fisher, items.flatten(), terms.flatten(0, 1))
        if bias_fisher is not None:
            self.table.add_rows_(bias_fisher, items.flatten(), coefficient.flatten())


def complement(p: Tensor) -> Tensor:
    """1 − p of whole softmaxes (..., V), as the sum of the others for an item above one half."""
    large = p > 0.5
    rest = p.masked_fill(large, 0.0).sum(dim=-1, keepdim=True)
    return torch.where(large, rest, 1 - p)


def _signs(seed: int, ids: Tensor, items: Tensor) -> Tensor:
    row, item = torch.broadcast_tensors(ids, items)
    return counter_rng.random_signs_at(seed, row, item, torch.float64)


def _without(values: Tensor, column: Tensor) -> Tensor:
    """Values (M, C) with zero at column (M,), where that is one of theirs."""
    inside = (column >= 0) & (column < values.shape[1])
    index = column.clamp(min=0, max=values.shape[1] - 1)[:, None]
    kept = values.gather(1, index).masked_fill_(inside[:, None], 0.0)
    return values.scatter_(1, index, kept)
