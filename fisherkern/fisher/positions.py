"""Every position's softmax at once: random signs make one backward pass serve all positions.

With independent signs s_t, E (Σ_t s_t J_tᵀ l_t)² = Σ_t (J_tᵀ l_t)²: the cross terms of positions
vanish.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fisherkern.adapters import ModelAdapter
from fisherkern.adapters.parameters import ParamView
from fisherkern.adapters.row_scaling import RowScaling
from fisherkern.errors import InputError
from fisherkern.fisher.factors.factor import CovarianceFactor
from fisherkern.fisher.factors.samplers import SoftmaxStats
from fisherkern.fisher.plan import ParamGrad
from fisherkern.fisher.settings import Settings
from fisherkern.ops import counter_rng

# Positions of a sequence have ids beside each other: sequence · 2²⁰ + number.
POSITION_IDS = 2**20
# Keys the draws of positions and their signs apart from those of items.
_DRAWN, _SIGNED = 0x504F53, 0x534947


@dataclasses.dataclass(frozen=True)
class PositionRows:
    """The positions of a bucket that count, a row each, sequence by sequence.

    sequence, place (M,): which sequence of the bucket and which column; ids (M,) keys of random
    numbers; weight (M,): the positions that a drawn one stands for; shape: (n, T).
    """

    sequence: Tensor
    place: Tensor
    ids: Tensor
    weight: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, counted: Tensor, sequence_ids: Tensor, settings: Settings) -> PositionRows:
        """Return the rows of positions `counted` (n, T) bool of sequences with ids (n,)."""
        if counted.shape[1] >= POSITION_IDS:
            raise InputError(f"positions: {counted.shape[1]} of a sequence are too many")
        number = counted.cumsum(dim=1) - 1
        keys = sequence_ids[:, None] * POSITION_IDS + number
        total = counted.sum(dim=1)
        weight = torch.ones_like(total, dtype=torch.float64)
        if isinstance(settings.positions, int):
            draws = counter_rng.uniform(settings.seed ^ _DRAWN, keys.flatten(), keys.new_zeros(1))
            order = draws.view(counted.shape).masked_fill(~counted, 2.0).argsort(dim=1, stable=True)
            rank = order.argsort(dim=1)
            counted = counted & (rank < settings.positions)
            weight = total / total.clamp(min=1, max=settings.positions)
        sequence, place = counted.nonzero(as_tuple=True)
        shape = counted.shape[0], counted.shape[1]
        return cls(sequence, place, keys[sequence, place], weight[sequence], shape)

    def __len__(self) -> int:
        return len(self.sequence)

    def by_place(self, values: Tensor, own: Tensor) -> Tensor:
        """Values (m, ...) of some rows at their sequences and places, (n, T, ...), else zero."""
        found = values.new_zeros(*self.shape, *values.shape[1:])
        return found.index_put_((self.sequence[own], self.place[own]), values)


@dataclasses.dataclass(frozen=True)
class PositionProbes:
    """Probe vectors over all positions of a bucket, from a factor with a row for each.

    Without `alone`, all positions share each probe, with random signs; with it, a probe has one
    position only, the first probes the first position of every sequence. `index` (n,): the
    bucket's sequences in the micro-batch.
    """

    rows: PositionRows
    factor: CovarianceFactor
    index: Tensor
    seed: int
    alone: bool
    # The items and β of the last lookup asked for.
    _made: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        """Backward passes: those of a position, times the positions where each has its own."""
        if not self.alone or not len(self.rows):
            return self.factor.probes
        return self.factor.probes * (int(self._number.max()) + 1)

    @functools.cached_property
    def _number(self) -> Tensor:
        """The number of each row among those of its sequence, (M,)."""
        rank = torch.arange(len(self.rows), device=self.rows.ids.device)
        start = torch.full((self.rows.shape[0],), len(rank), device=rank.device)
        start.scatter_reduce_(0, self.rows.sequence, rank, "amin")
        return rank - start[self.rows.sequence]

    def vectors(self, index: Tensor, span: slice) -> Tensor:
        """Return a span's probes at sequences `index` (m,) of the micro-batch, (R, m, T, D)."""
        if self.alone:
            columns = [
                self.rows.by_place(self.factor.probe_vectors(own, column)[0] * root[:, None], own)
                for own, column, root in self._apart(span)
            ]
            whole = torch.stack(columns)
        else:
            given = self.factor.probe_vectors(self._every, span)
            given = given * self._signed[:, span].t()[:, :, None].to(given.dtype)
            whole = self.rows.by_place(given.transpose(0, 1), self._every).movedim(2, 0)
        if len(index) == len(self.index):
            return whole
        return whole[:, (self.index[None] == index[:, None]).int().argmax(dim=1)]

    def cross_terms(self, hidden: Tensor, items: Tensor, span: slice) -> Tensor:
        """Σ_t β_tvr h_t of items (n, m) and the probes of a span: (R, n, m, D)."""
        if not self.alone:
            beta = self._beta(items)[:, :, span].to(hidden.dtype)
            return self._over_places(beta, hidden, self._every).permute(2, 0, 1, 3)
        found = []
        for own, column, root in self._apart(span):
            beta = self.factor.tied_cross_term(own, items[self.rows.sequence[own]])[:, :, column]
            beta = (beta * root[:, None, None]).to(hidden.dtype)
            found.append(self._over_places(beta, hidden[own], own)[:, :, 0])
        return torch.stack(found)

    def _over_places(self, beta: Tensor, hidden: Tensor, own: Tensor) -> Tensor:
        """Σ_t β_tvr h_t of some rows: (M, m, R) and (M, D) -> (n, m, R, D)."""
        by_place = self.rows.by_place(beta.flatten(1), own), self.rows.by_place(hidden, own)
        summed: Tensor = by_place[0].transpose(1, 2) @ by_place[1]
        apart: Tensor = summed.unflatten(1, beta.shape[1:])
        return apart

    def _beta(self, items: Tensor) -> Tensor:
        """β (M, m, R) of every row with its signs, made once for all probes."""
        if self._made.get("items") is not items:
            beta = self.factor.tied_cross_term(self._every, items[self.rows.sequence])
            beta = beta * self._signed[:, None].to(beta.dtype)
            self._made.update(items=items, beta=beta)
        return self._made["beta"]

    @functools.cached_property
    def _every(self) -> Tensor:
        return torch.arange(len(self.rows), device=self.rows.ids.device)

    @functools.cached_property
    def _signed(self) -> Tensor:
        """What each row's columns are multiplied by where all share a probe, (M, R)."""
        columns = torch.arange(self.factor.probes, device=self.rows.ids.device)
        bits = counter_rng.random_bits(self.seed ^ _SIGNED, self.rows.ids, columns)
        root = self.rows.weight.sqrt()
        return root[:, None] * counter_rng.signs(bits, 17, root.dtype)

    def _apart(self, span: slice) -> Iterator[tuple[Tensor, slice, Tensor]]:
        """(Rows, column of L, what they are multiplied by) of each probe of one position."""
        root = self.rows.weight.sqrt()
        for number in range(self.count)[span]:
            place, probe = divmod(number, self.factor.probes)
            own = (self._number == place).nonzero()[:, 0]
            yield own, slice(probe, probe + 1), root[own]


@dataclasses.dataclass(frozen=True)
class TiedPositionGrad:
    """Lookups of the output layer's own weight, with the cross terms of all positions."""

    grad: ParamGrad
    probes: PositionProbes
    stats: SoftmaxStats
    weight: ParamView
    row_scaling: RowScaling | None

    def add_square_(self, fisher: Tensor, span: slice, deltas: list[Tensor | None]) -> None:
        """fisher[v] += Σ_r S_v^r ∘ (S_v^r + 2 Σ_t β_tvr h_t) of some probes."""
        count = len(range(self.probes.count)[span])
        items, outside = self._items
        delta = self.grad.joined_delta(deltas, count).to(fisher.dtype)  # (R, n, m, D)
        cross = self.probes.cross_terms(self.stats.h, items, span)
        if self.row_scaling is not None:
            cross = self.row_scaling.pulled(self.stats.table.weight, items, cross)
        cross = cross.to(fisher.dtype).masked_fill(outside[None, :, :, None], 0.0)
        # Equal ids of one sequence are summed before squaring; their cross term is the same.
        row, segment, begin = self._segments
        sums = delta.new_zeros(len(delta), len(row), delta.shape[-1])
        sums.index_add_(1, segment, delta.flatten(1, 2))
        square = (sums * (sums + 2 * cross.flatten(1, 2)[:, begin])).sum(dim=0)
        fisher.index_add_(0, row.clamp(min=0), square.masked_fill_((row < 0)[:, None], 0.0))

    @functools.cached_property
    def _items(self) -> tuple[Tensor, Tensor]:
        """The logit columns of the lookups (n, m), and which are none."""
        ids = self.grad.joined_lookup().ids
        first = (self.weight.start - self.grad.param.start) // self.weight.shape[1]
        return self.stats.table.columns(ids, first)

    @functools.cached_property
    def _segments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of pairs of a sequence and a row: the row, each lookup's pair, each pair's first."""
        ids = self.grad.joined_lookup().ids
        flat = ids.flatten()
        numbers = torch.arange(len(flat), device=flat.device)
        span = int(ids.max()) + 2 if len(flat) else 1
        first = torch.arange(len(ids), device=flat.device)[:, None] * span
        _, segment = torch.unique((first + ids + 1).flatten(), return_inverse=True)
        begin = torch.full((int(segment.max()) + 1 if len(segment) else 0,), len(flat))
        begin = begin.to(flat.device).scatter_reduce_(0, segment, numbers, "amin")
        return flat[begin], segment, begin


def counted_positions(model: ModelAdapter, batch: Any, shape: tuple[int, int]) -> Tensor:
    """Which positions count, (n, T) bool: those with a label, or where there are none, an item.

    Raises:
        InputError: Labels or places are of another shape.
    """
    labels = model.labels(batch)
    counted = model.positions(batch) if labels is None else labels != -100
    if counted is None:
        counted = torch.ones(shape, dtype=torch.bool)
    counted = counted.to(model.device)
    spare = counted.shape[1] - shape[1]
    # An encoder may leave out columns on the left that are padding in every row.
    if spare > 0 and not bool(counted[:, :spare].any()):
        counted = counted[:, spare:]
    if tuple(counted.shape) != shape:
        raise InputError(
            f"positions: the model gives {shape[1]} positions, and the batch has "
            f"{counted.shape[1]} labels or places"
        )
    return counted


def position_targets(model: ModelAdapter, batch: Any, rows: PositionRows) -> Tensor:
    """Return the logit columns of the rows' labels, (M,).

    Raises:
        InputError: The batch has no labels.
    """
    labels = model.labels(batch)
    if labels is None:
        raise InputError("positions: sampler 'target' needs a label for every position")
    labels = labels.to(model.device)[:, -rows.shape[1] :]
    return labels[rows.sequence, rows.place].long() - model.first_item
