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
from fisherkern.fisher.factor import CovarianceFactor
from fisherkern.fisher.plan import ParamGrad
from fisherkern.fisher.samplers import SoftmaxStats
from fisherkern.fisher.settings import Settings
from fisherkern.ops import counter_rng

# Positions of a sequence have ids beside each other: sequence · 2²⁰ + number.
_IDS = 2**20
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
        """The rows of positions `counted` (n, T) bool of the sequences with these ids (n,)."""
        if counted.shape[1] >= _IDS:
            raise InputError(f"positions: {counted.shape[1]} of a sequence are too many")
        number = counted.cumsum(dim=1) - 1
        keys = sequence_ids[:, None] * _IDS + number
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
        """The probes of a span at sequences `index` (m,) of the micro-batch, (R, m, T, D)."""
        found = [self.rows.by_place(column, own) for own, column in self._columns(span)]
        whole = torch.stack(found)
        if len(index) == len(self.index):
            return whole
        return whole[:, (self.index[None] == index[:, None]).int().argmax(dim=1)]

    def cross_terms(self, hidden: Tensor, items: Tensor, span: slice) -> Tensor:
        """Σ_t β_tvr h_t of items (n, m) and the probes of a span: (R, n, m, D)."""
        found = []
        for own, probe, scale in self._probes(span):
            beta = self.factor.tied_cross_term(own, items[self.rows.sequence[own]])
            beta = beta[:, :, probe].to(hidden.dtype) * scale.to(hidden.dtype)[:, None]
            by_place = self.rows.by_place(beta, own), self.rows.by_place(hidden[own], own)
            found.append(torch.einsum("ntm,ntd->nmd", *by_place))
        return torch.stack(found)

    def _columns(self, span: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """(Rows, their columns (m, D)) of each probe."""
        for own, probe, scale in self._probes(span):
            column = self.factor.probe_vectors(own, slice(probe, probe + 1))[0]
            yield own, column * scale.to(column.dtype)[:, None]

    def _probes(self, span: slice) -> Iterator[tuple[Tensor, int, Tensor]]:
        """(Rows, column of L, what they are multiplied by) of each probe."""
        root = self.rows.weight.sqrt()
        every = torch.arange(len(self.rows), device=root.device)
        for number in range(self.count)[span]:
            place, probe = divmod(number, self.factor.probes)
            if self.alone:
                own = (self._number == place).nonzero()[:, 0]
                yield own, probe, root[own]
            else:
                columns = every.new_full((1,), probe)
                bits = counter_rng.random_bits(self.seed ^ _SIGNED, self.rows.ids, columns)
                yield every, probe, root * counter_rng.signs(bits[:, 0], 17, root.dtype)


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
        ids = self.grad.joined_lookup().ids
        offset = (self.weight.start - self.grad.param.start) // self.weight.shape[1]
        items = ids - offset
        outside = (ids < 0) | (items < 0) | (items >= self.weight.shape[0])
        count = len(range(self.probes.count)[span])
        delta = self.grad.joined_delta(deltas, count).to(fisher.dtype)  # (R, n, m, D)
        items = items.masked_fill(outside, 0)
        cross = self.probes.cross_terms(self.stats.h, items, span)
        if self.row_scaling is not None:
            cross = self.row_scaling.pulled(self.stats.weight, items, cross)
        cross = cross.to(fisher.dtype).masked_fill_(outside[None, :, :, None], 0.0)
        # Equal ids of one sequence are summed before squaring; their cross term is the same.
        flat = ids.flatten()
        first = torch.arange(len(ids), device=flat.device)[:, None] * (len(fisher) + 1)
        _, segment = torch.unique((first + ids + 1).flatten(), return_inverse=True)
        number = int(segment.max()) + 1 if len(segment) else 0
        sums = delta.new_zeros(len(delta), number, delta.shape[-1])
        sums.index_add_(1, segment, delta.flatten(1, 2))
        begin = torch.full((number,), len(flat), device=flat.device)
        begin.scatter_reduce_(0, segment, torch.arange(len(flat), device=flat.device), "amin")
        square = (sums * (sums + 2 * cross.flatten(1, 2)[:, begin])).sum(dim=0)
        row = flat[begin]
        fisher.index_add_(0, row.clamp(min=0), square.masked_fill_((row < 0)[:, None], 0.0))


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
    """The logit columns of the rows' labels, (M,).

    Raises:
        InputError: The batch has no labels.
    """
    labels = model.labels(batch)
    if labels is None:
        raise InputError("positions: sampler 'target' needs a label for every position")
    labels = labels.to(model.device)[:, -rows.shape[1] :]
    return labels[rows.sequence, rows.place].long() - model.first_item
