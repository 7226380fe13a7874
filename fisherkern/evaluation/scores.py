"""Scores of a catalogue, held whole or made tile by tile, and the ranks of items among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fisherkern.adapters import ModelAdapter
from fisherkern.errors import InputError
from fisherkern.ops.softmax_lse import LogitProduct, tile_rows

# ItemPairs of a row and an item, each (E,) int64.
ItemPairs = tuple[Tensor, Tensor]
# Rows whose targets' scores are made at once.
_ROWS = 64


class Scores(Protocol):
    """Scores of N sequences for the items 1..V."""

    @property
    def device(self) -> torch.device:
        """Where the scores are computed."""

    def full_ranks(self, target: Tensor, excluded: ItemPairs | None) -> Tensor:
        """Return the ranks (N,) of `target` (N,) among all items; see `full_ranks`."""

    def sampled_ranks(self, target: Tensor, negatives: Tensor) -> Tensor:
        """Return the ranks (N,) of `target` (N,) among `negatives` (N, S); see `sampled_ranks`."""

    def top(self, k: int, excluded: ItemPairs | None) -> tuple[Tensor, Tensor]:
        """Return the k best items (N, k) and their scores; see `top_columns`."""


class NaNScoreError(Exception):
    """Rows of a batch have a score that is NaN."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.row = int(rows.cpu().nonzero()[0])


@dataclasses.dataclass(frozen=True)
class WholeScores:
    """Scores (N, V), column v-1 is item v.

    Raises:
        NaNScoreError: A score is NaN.
    """

    scores: Tensor

    def __post_init__(self) -> None:
        bad = torch.isnan(self.scores).any(dim=1)
        if bad.any():
            raise NaNScoreError(bad)

    @property
    def device(self) -> torch.device:
        """Where the scores are."""
        return self.scores.device

    def full_ranks(self, target: Tensor, excluded: ItemPairs | None) -> Tensor:
        """Return the ranks among all items; allocates one (N, V) bool tensor."""
        return full_ranks(self.scores, target, excluded)

    def sampled_ranks(self, target: Tensor, negatives: Tensor) -> Tensor:
        """Return the ranks among `negatives`."""
        return sampled_ranks(self.scores, target, negatives)

    def top(self, k: int, excluded: ItemPairs | None) -> tuple[Tensor, Tensor]:
        """Return the k best items; allocates scores and masks, (N, V) each."""
        z = without(self.scores, 0, excluded)
        column, best = top_columns(z, k)
        return column + 1, best


@dataclasses.dataclass(frozen=True)
class TiledScores:
    """Scores W h + b in fp32, or fp64 of fp64 tensors, an item tile at a time.

    Bit for bit those of one fp32 product over all items, as far as the library multiplies both
    alike: MKL and oneDNN do so on every shape that was tried, but none of them promises it.

    Args:
        h: (N, D), of any floating type.
        weight: (V_out, D), the output layer's.
        bias: (V_out,) or None.
        columns: (V,) int64, the row of W of each item; or the row of item 1, the others after it.
        num_items: V.
        elements: Scores held at once, at most; at least N.
    """

    h: Tensor
    weight: Tensor
    bias: Tensor | None
    columns: Tensor | int
    num_items: int
    elements: int

    @property
    def device(self) -> torch.device:
        """Where the product is computed."""
        return self.h.device

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (s, z) with z (N, C) the scores of items s + 1 to s + C; the next overwrites it."""
        step = max(1, min(tile_rows(self.h), self.elements // max(1, len(self.h))))
        product = LogitProduct(self.h, step)
        for start in range(0, self.num_items, step):
            stop = min(start + step, self.num_items)
            if isinstance(self.columns, int):
                rows: slice | Tensor = slice(self.columns + start, self.columns + stop)
            else:
                rows = self.columns[start:stop]
            yield start, product(self.weight[rows], None if self.bias is None else self.bias[rows])

    def full_ranks(self, target: Tensor, excluded: ItemPairs | None) -> Tensor:
        """Return the ranks among all items; holds two tiles."""
        with _no_autocast(self.device):
            own = self.guess(target)
            ranks, exact = self.count(own, target, excluded)
            # Another product than the tile's may round otherwise, and a tie would not be seen.
            if not torch.equal(own, exact):
                ranks, _ = self.count(exact, target, excluded)
        return ranks

    def sampled_ranks(self, target: Tensor, negatives: Tensor) -> Tensor:
        """Return the ranks among `negatives`; holds the (N, S + 1, D) rows of W they have."""
        z = self.scores_of(torch.cat([target[:, None], negatives], dim=1))
        if (bad := z.isnan().any(dim=1)).any():
            raise NaNScoreError(bad)
        return 1 + (z[:, 1:] >= z[:, :1]).sum(dim=1)

    def top(self, k: int, excluded: ItemPairs | None) -> tuple[Tensor, Tensor]:
        """Return the k best items; holds a few tiles and the k best of those before."""
        items = torch.empty(len(self.h), 0, dtype=torch.int64, device=self.device)
        best = torch.empty(len(self.h), 0, dtype=self.score_type, device=self.device)
        with _no_autocast(self.device):
            for start, z in self.tiles():
                place = torch.arange(start + 1, start + 1 + z.shape[1], device=self.device)
                items = torch.cat([items, place.expand(len(z), -1)], dim=1)
                best = torch.cat([best, without(z, start, excluded)], dim=1)
                column, best = top_columns(best, k)
                items = items.gather(1, column)
        return items, best

    def scores_of(self, items: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the scores of items (N, S); with `chosen` (N, S) of those, zeros for others."""
        with _no_autocast(self.device):
            h = self.h.to(self.score_type)
            if chosen is not None:
                row, column = chosen.nonzero(as_tuple=True)
                z = h.new_zeros(items.shape)
                rows = self._rows_of(items[row, column])
                z[row, column] = (self.weight[rows].to(h.dtype) * h[row]).sum(dim=1)
                if self.bias is not None:
                    z[row, column] += self.bias[rows].to(h.dtype)
                return z
            rows = self._rows_of(items)
            z = (self.weight[rows].to(h.dtype) @ h[:, :, None]).squeeze(2)
            if self.bias is not None:
                z += self.bias[rows].to(h.dtype)
        return z

    @property
    def score_type(self) -> torch.dtype:
        """Of the scores: fp32, or fp64 of fp64 tensors."""
        return torch.promote_types(self.h.dtype, torch.float32)

    def _rows_of(self, items: Tensor) -> Tensor:
        """Return the rows of W of items 1..V."""
        if isinstance(self.columns, int):
            return items - 1 + self.columns
        return self.columns[items - 1]

    def guess(self, target: Tensor) -> Tensor:
        """Return the targets' scores (N,), by a small product of their own."""
        rows, found = self._rows_of(target), []
        for first in range(0, len(target), _ROWS):
            part, own = slice(first, first + _ROWS), rows[first : first + _ROWS]
            product = LogitProduct(self.h[part], len(own))
            z = product(self.weight[own], None if self.bias is None else self.bias[own])
            found.append(z.diagonal().clone())
        return torch.cat(found)

    def count(
        self, own: Tensor, target: Tensor, excluded: ItemPairs | None
    ) -> tuple[Tensor, Tensor]:
        """Return the ranks (N,) of targets that score `own` (N,), and their scores in the tiles."""
        ranks, exact = torch.zeros_like(target), own.clone()
        bad = torch.zeros_like(target, dtype=torch.bool)
        for start, z in self.tiles():
            bad |= z.amax(dim=1).isnan()
            ahead = z >= own[:, None]
            if excluded is not None:
                row, column = excluded[0], excluded[1] - 1 - start
                inside = (column >= 0) & (column < z.shape[1])
                ahead[row[inside], column[inside]] = False
            place = target - 1 - start
            here = ((place >= 0) & (place < z.shape[1])).nonzero()[:, 0]
            exact[here] = z[here, place[here]]
            ahead[here, place[here]] = True  # the "1 +" of the formula
            ranks += ahead.sum(dim=1)
        if bad.any():
            raise NaNScoreError(bad)
        return ranks, exact


@dataclasses.dataclass(frozen=True)
class ScoringLayer:
    """The output layer of a model, with which the last product is done in fp32."""

    adapter: ModelAdapter

    @classmethod
    def of(cls, adapter: ModelAdapter, batch: object) -> ScoringLayer | None:
        """Find the output layer on a prepared batch; None where it cannot be split off."""
        found = cls._found(adapter, batch)
        types = {tensor.dtype for tensor in adapter.module.parameters()}
        if (
            found is None
            and types == {torch.float32}
            and torch.is_autocast_enabled(adapter.device.type)
        ):
            # Autocast may round a product and not the bias after it: the layer is the same without.
            with _no_autocast(adapter.device):
                found = cls._found(adapter, batch)
        return found

    @classmethod
    def _found(cls, adapter: ModelAdapter, batch: object) -> ScoringLayer | None:
        try:
            adapter = adapter.with_output_layer(batch)
        except InputError:  # random, or of the whole batch: whatever it is, its logits are asked
            return None
        return None if adapter.encode is None or adapter.head is None else cls(adapter)

    def scores(
        self, batch: object, columns: Tensor | int, num_items: int, elements: int
    ) -> TiledScores:
        """Return the scores of the items for a prepared batch; see `TiledScores`."""
        assert self.adapter.encode is not None
        weight, bias = self.head()
        h = self.adapter.encode(batch)
        if isinstance(columns, Tensor):
            columns = columns.to(h.device)
        return TiledScores(h, weight, bias, columns, num_items, elements)

    def logits(self, batch: object) -> Tensor:
        """Return the logits (N, V_out) of a prepared batch, the last product in fp32 or wider."""
        assert self.adapter.encode is not None
        weight, bias = self.head()
        h = self.adapter.encode(batch)
        with _no_autocast(h.device):
            return LogitProduct(h, len(weight))(weight, bias)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return W (V_out, D) and b (V_out,) or None."""
        assert self.adapter.head is not None
        return self.adapter.head()


def rounds(adapter: ModelAdapter, logits: Tensor | None = None) -> bool:
    """Whether a model's logits may be rounded to half precision, whatever type they have now.

    A model in bf16 may give them in fp32, and so may one under autocast: the ties are in them.
    """
    if logits is not None and logits.dtype in (torch.float16, torch.bfloat16):
        return True
    halves = (torch.float16, torch.bfloat16)
    own = any(tensor.dtype in halves for tensor in adapter.module.parameters())
    return own or torch.is_autocast_enabled(adapter.device.type)


def full_ranks(scores: Tensor, target: Tensor, excluded: ItemPairs | None) -> Tensor:
    """Rank of each target among all items: 1 + #{v != target, v not excluded: score_v >= score}.

    scores (N, V), column v-1 is item v, no NaN; target (N,) int64 items in 1..V on the
    same device; excluded = (row, item) int64 pairs, each (E,), whose items are no
    candidates, or None. A pair that names a row's own target is ignored. Ties count
    against the target. Returns (N,) int64; allocates one (N, V) bool tensor.
    """
    own = scores.gather(1, target[:, None] - 1)
    ahead = scores >= own
    if excluded is not None:
        row, item = excluded
        ahead[row, item - 1] = False
    ahead.scatter_(1, target[:, None] - 1, True)  # the "1 +" of the formula
    return ahead.sum(dim=1)


def sampled_ranks(scores: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
    """Rank of each target among its negatives: 1 + #{v in negatives: score_v >= score}.

    scores (N, V) and target (N,) as in `full_ranks`; negatives (N, S) int64 items in
    1..V, distinct within a row and without the target. Returns (N,) int64.
    """
    own = scores.gather(1, target[:, None] - 1)
    return 1 + (scores.gather(1, negatives - 1) >= own).sum(dim=1)


def without(scores: Tensor, start: int, excluded: ItemPairs | None) -> Tensor:
    """Return the scores of items start + 1.., -inf where a pair of `excluded` names one."""
    if excluded is None:
        return scores
    row, column = excluded[0], excluded[1] - 1 - start
    inside = (column >= 0) & (column < scores.shape[1])
    return scores.index_put((row[inside], column[inside]), scores.new_tensor(-torch.inf))


def top_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k columns of the highest scores, ascending, and these scores, (N, k) each.

    Of equal scores the first columns are taken, so that tiles and processes change nothing; all
    columns where there are no more than k.
    """
    k = min(k, scores.shape[1])
    least = scores.topk(k, dim=1).values[:, -1:]
    above, equal = scores > least, scores == least
    equal &= equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)
    column = (above | equal).nonzero()[:, 1].view(len(scores), k)
    return column, scores.gather(1, column)


def _no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)
