"""Scores of items of which every process has some: ranks joined from counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fisherkern.adapters import ModelAdapter
from fisherkern.adapters.batches import batch_size, batch_slice, sequence_lengths
from fisherkern.adapters.sharded.models import ShardedModel
from fisherkern.adapters.sharded.output_layer import OwnItems, seen_by, with_sharded_layer
from fisherkern.errors import InputError
from fisherkern.evaluation.scores import ItemPairs, NaNScoreError, TiledScores, top_columns
from fisherkern.processes import joined_sum, own_part, stacked, together


@dataclasses.dataclass(frozen=True)
class ShardedScores:
    """Scores of N sequences: `own` those of this process's items, `items` (n,) their numbers − 1.

    All processes ask for the same ranks at the same time. Each sends a score or a count a
    sequence, or one for each candidate.
    """

    own: TiledScores
    items: Tensor

    @property
    def device(self) -> torch.device:
        """Where the scores are computed."""
        return self.own.device

    def full_ranks(self, target: Tensor, excluded: ItemPairs | None) -> Tensor:
        """Return the ranks among all items: the sum of the processes' counts."""
        local, here = self._local(target)
        pairs = None
        if excluded is not None:
            item, inside = self._local(excluded[1])
            pairs = excluded[0][inside], item[inside]
        guess = self.own.h.new_zeros(len(target), dtype=self.own.score_type)
        if bool(here.any()):
            part = dataclasses.replace(self.own, h=self.own.h[here])
            guess[here] = part.guess(local[here])
        score = joined_sum(guess)
        ranks, exact = self._count(score, local, here, pairs)
        # Another product than the tile's may round otherwise, and a tie would not be seen.
        if not torch.equal(score, exact):
            ranks, _ = self._count(exact, local, here, pairs)
        return ranks

    def sampled_ranks(self, target: Tensor, negatives: Tensor) -> Tensor:
        """Return the ranks among `negatives`, whose scores are joined."""
        items = torch.cat([target[:, None], negatives], dim=1)
        local, here = self._local(items)
        z = joined_sum(self.own.scores_of(local, here))
        if (bad := z.isnan().any(dim=1)).any():
            raise NaNScoreError(bad)
        return 1 + (z[:, 1:] >= z[:, :1]).sum(dim=1)

    def top(self, k: int, excluded: ItemPairs | None) -> tuple[Tensor, Tensor]:
        """Return the k best items, of every process's k best."""
        pairs = None
        if excluded is not None:
            item, inside = self._local(excluded[1])
            pairs = excluded[0][inside], item[inside]
        rows = len(self.own.h)
        items = torch.full((rows, k), 1, dtype=torch.int64, device=self.device)
        best = self.own.h.new_full((rows, k), -torch.inf, dtype=self.own.score_type)
        if len(self.items):
            number, found = self.own.top(k, pairs)
            items[:, : number.shape[1]] = self.items[number - 1] + 1
            best[:, : number.shape[1]] = found
        items, best = (
            stacked(items).movedim(0, 1).flatten(1),
            stacked(best).movedim(0, 1).flatten(1),
        )
        order = items.argsort(dim=1, stable=True)
        items = items.gather(1, order)
        column, best = top_columns(best.gather(1, order), k)
        return items.gather(1, column), best

    def _local(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers from 1 of items among the own ones, 0 for none, and which are own."""
        place = torch.searchsorted(self.items, (items - 1).contiguous())
        place = place.clamp(max=max(len(self.items) - 1, 0))
        here = torch.zeros_like(items, dtype=torch.bool)
        if len(self.items):
            here = self.items[place] == items - 1
        return torch.where(here, place + 1, 0), here

    def _count(
        self, score: Tensor, local: Tensor, here: Tensor, excluded: ItemPairs | None
    ) -> tuple[Tensor, Tensor]:
        """Return the ranks (N,) of targets with these scores, and their scores in the tiles."""
        bad = torch.zeros_like(here)
        ranks, exact = torch.zeros_like(local), torch.zeros_like(score)
        try:
            ranks, found = self.own.count(score, local, excluded)
            exact = torch.where(here, found, 0.0)
        except NaNScoreError as error:
            bad[error.row] = True
        if (anywhere := stacked(bad).any(dim=0)).any():
            raise NaNScoreError(anywhere)
        return joined_sum(ranks), joined_sum(exact)


class ShardedScoringLayer:
    """The output layer of a model whose item table has its rows over the processes.

    Args:
        adapter: The model's.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        known = adapter.library.item_tables(adapter.module)
        self.shards = ShardedModel(adapter.module, known, adapter.num_items)
        self.adapter = adapter
        self._own: OwnItems | None = None
        if not self.shards.tables:
            raise InputError("model: none of its DTensors is an item table; evaluate it unsharded")

    def scores(
        self, batch: Any, columns: Tensor | int, num_items: int, elements: int
    ) -> ShardedScores:
        """Return the scores of a prepared batch, the same in all processes; see `TiledScores`."""
        own = self._start(batch)
        h = self._hidden(batch, own.weight)
        device, bounds = own.weight.device, own.numbers
        if isinstance(columns, Tensor):
            columns = columns.to(device)
        else:
            columns = torch.arange(columns, columns + num_items, device=device)
        inside = (columns >= bounds.start) & (columns < bounds.stop)
        items = inside.nonzero()[:, 0]
        places = columns[items] - bounds.start
        scores = TiledScores(h, own.weight, own.bias, places, len(items), elements)
        return ShardedScores(scores, items)

    def _start(self, batch: Any) -> OwnItems:
        """Find the layer on the first batch, and have the rows that the batch names."""
        if self._own is None:
            found = with_sharded_layer(self.shards, self.adapter, batch)
            self._own = OwnItems.of(self.shards, found)
            assert found.head is not None
            self._head = self.shards.head(found.head)
            self.adapter = seen_by(self.shards, found)
        self.shards.fetch_for(batch, self._head)
        return self._own

    @property
    def num_columns(self) -> int:
        """V_out of the last batch."""
        return self._head.num_items

    def _hidden(self, batch: Any, like: Tensor) -> Tensor:
        """Encode a batch, each process a part of it."""
        assert self.adapter.encode is not None
        n = batch_size(batch)
        part = own_part(0, sequence_lengths(batch))
        h = like.new_zeros(n, like.shape[1], dtype=torch.promote_types(like.dtype, torch.float32))
        with together():
            if part.stop > part.start:
                h[part] = self.adapter.encode(batch_slice(batch, part.start, part.stop)).to(h.dtype)
        return joined_sum(h)
