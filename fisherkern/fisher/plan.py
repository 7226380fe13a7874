"""How each parameter's squared gradients are accumulated, decided from one forward pass."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fisherkern import ops as kernels
from fisherkern.adapters.parameters import Parameters, ParamView
from fisherkern.fisher.factors.factor import CovarianceFactor
from fisherkern.fisher.factors.samplers import SoftmaxStats
from fisherkern.fisher.forward.capture import CapturedOp, ParamUse
from fisherkern.fisher.forward.graph import nodes_below, params_outside
from fisherkern.fisher.forward.shared_tensors import SharedView
from fisherkern.fisher.layers.grads import EmbeddingGrad, Joinable
from fisherkern.fisher.layers.shared import uses_of
from fisherkern.fisher.schedule import stored_sequences
from fisherkern.ops.lookup_square import LookupSegments


@dataclasses.dataclass
class ParamGrad:
    """All uses of one parameter or view, and, in the same order, the indices of their ops.

    `deltas`, below, are the output gradients by op, (R, N, ...), None where none arrived.
    """

    param: ParamView
    ops: list[int]
    uses: list[ParamUse]
    _joined: dict[tuple[int, ...], Joinable] = dataclasses.field(default_factory=dict)

    @property
    def embedding_only(self) -> bool:
        """Whether lookups are its only uses."""
        return all(isinstance(use, EmbeddingGrad) for use in self.uses)

    def joined_lookup(self) -> EmbeddingGrad:
        """All lookups as one over their positions side by side; see `joined_delta`."""
        return EmbeddingGrad.joined([use for use in self.uses if isinstance(use, EmbeddingGrad)])

    def joined_delta(self, deltas: Sequence[Tensor | None], probes: int) -> Tensor:
        """Return the output gradients that belong to `joined_lookup`, (R, N, T, D)."""
        parts = []
        for op, use in zip(self.ops, self.uses, strict=True):
            assert isinstance(use, EmbeddingGrad)
            delta = deltas[op]
            shape = probes, *use.ids.shape, use.param.shape[1]
            if delta is None:
                parts.append(torch.zeros(shape, device=use.ids.device))
            else:
                parts.append(use.positions(delta))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def add_square_(self, fisher: Tensor, deltas: Sequence[Tensor | None]) -> None:
        """fisher += Σ_r Σ_n (the sum over the uses of their gradients)²."""
        indices, present = [], []
        for index, op in enumerate(self.ops):
            if (delta := deltas[op]) is not None:
                indices.append(index)
                present.append(delta)
        uses = [self.uses[index] for index in indices]
        if len(uses) == 1:
            uses[0].add_square_(fisher, present[0])
        elif uses and (joined := self._join(tuple(indices))) is not None:
            parts = [
                use.positions(delta)
                for use, delta in zip(uses, present, strict=True)
                if isinstance(use, Joinable)
            ]
            joined.add_square_(fisher, torch.cat(parts, dim=2))
        elif uses:
            for probe in zip(*present, strict=True):
                _add_stored_square_(fisher, uses, probe)

    def _join(self, indices: tuple[int, ...]) -> Joinable | None:
        """Return the uses of these indices as one, kept for the next probe; None if they differ."""
        uses = [self.uses[index] for index in indices]
        first = uses[0]
        if any(type(use) is not type(first) for use in uses) or not isinstance(first, Joinable):
            return None
        if indices not in self._joined:
            self._joined[indices] = first.joined(uses)
        return self._joined[indices]


def _add_stored_square_(fisher: Tensor, uses: Sequence[ParamUse], deltas: Sequence[Tensor]) -> None:
    """`add_square_` of one probe, for uses that cannot be joined: gradients are stored."""
    n = len(deltas[0])
    step = stored_sequences(fisher.numel())
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))
        total = fisher.new_zeros(part.stop - first, *fisher.shape)
        for use, delta in zip(uses, deltas, strict=True):
            total += use.per_sequence(delta, part)
        fisher += total.square_().sum(dim=0)


@dataclasses.dataclass
class Plan:
    """What handlers serve, and the names of the parameters that need per-sequence autograd."""

    grads: list[ParamGrad]
    fallback: set[str]

    def grads_of(self, name: str) -> list[ParamGrad]:
        """Those of one parameter and its views."""
        return [grad for grad in self.grads if grad.param.name == name]

    @property
    def reached(self) -> set[str]:
        """Names of the parameters that the result depends on."""
        return {grad.param.name for grad in self.grads} | self.fallback


def make_plan(
    result: Tensor, ops: Sequence[CapturedOp], parameters: Parameters, usable: Sequence[int]
) -> Plan:
    """Group the uses at the usable ops by parameter; other uses send a name to the fallback.

    `result` (N, ...) is what the probes are applied to; `usable` as `per_sequence_ops` gives it.
    """
    usable = _outermost(ops, usable)
    fallback = params_outside(result, [ops[i] for i in usable], parameters)
    grads: dict[ParamView, ParamGrad] = {}
    for index in usable:
        for use in ops[index].uses:
            param, uses = use.param, [use]
            if isinstance(param, SharedView):
                if not param.tensor.served:
                    fallback |= set(param.tensor.names)
                    continue
                uses = uses_of(use, param.tensor)
            for use in uses:
                grad = grads.setdefault(use.param, ParamGrad(use.param, [], []))
                grad.ops.append(index)
                grad.uses.append(use)
    fallback |= _overlapping(list(grads))
    return Plan([g for g in grads.values() if g.param.name not in fallback], fallback)


def _outermost(ops: Sequence[CapturedOp], usable: Sequence[int]) -> list[int]:
    """Return the usable ops but for those that make what another one takes for a parameter.

    The gradients of the parameters that they use come through that other one.
    """
    inside = nodes_below(*(node for index in usable for node in ops[index].described))
    return [index for index in usable if ops[index].output.node not in inside]


# Powers of 2 that factors of sequences have, and how many roundings may come of another order of
# sums: of what mixes sequences at least half is left.
_BASE, _ROUNDING = 32, 64


def per_sequence_ops(result: Tensor, ops: Sequence[CapturedOp], whole: bool = False) -> list[int]:
    """Return indices of the ops that `result` depends on sequence by sequence, as read.

    One backward pass from the first and one from the last sequence. An op without a gradient
    is a dead branch. One with a gradient at another sequence mixes sequences, or has another
    dimension (time, say) where sequences are expected. Two passes, because time with a single
    position in use looks like sequences to the one of the same index. If both readings of a
    call pass, it is ambiguous and handled by the fallback. `whole`: every sequence is told from
    every other, by passes in which the sequences' gradients have factors of their own.
    """
    if not ops:
        return []
    usable = set(range(len(ops)))
    wrong = []
    factors = _digit_factors(len(result)) if whole else _ends(len(result))
    plain: dict[int, Tensor] = {}
    for factor in factors:
        for index, delta in enumerate(_gradients(result, ops, factor.to(result))):
            if delta is None:
                usable.discard(index)
                continue
            rows = ops[index].sequences_first(delta[None])[0].reshape(len(result), -1)
            if not whole:
                wrong.append((index, rows[factor == 0].any()))
            elif index not in plain:
                plain[index] = rows
            else:
                expected = plain[index] * factor.to(rows)[:, None]
                gap, size = ((t.abs().amax(dim=1)) for t in (rows - expected, expected))
                rounding = _ROUNDING * torch.finfo(rows.dtype).eps
                wrong.append((index, ~(gap <= rounding * size).all()))
    # All read back at once: a GPU is waited for only here.
    answers = torch.stack([answer for _, answer in wrong]).tolist() if wrong else []
    usable -= {index for (index, _), answer in zip(wrong, answers, strict=True) if answer}
    readings = collections.Counter(ops[index].output.node for index in usable)
    return sorted(index for index in usable if readings[ops[index].output.node] == 1)


def _gradients(result: Tensor, ops: Sequence[CapturedOp], factor: Tensor) -> list[Tensor | None]:
    """By op, the gradient of one random number of each sequence, times its factor (n,)."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(result[0].shape, generator=generator).to(result)
    edges = {op.output.node: op.output for op in ops}
    seed = factor.view(-1, *[1] * (result.dim() - 1)) * direction
    gradients = torch.autograd.grad(
        result, list(edges.values()), seed, retain_graph=True, allow_unused=True
    )
    by_node = dict(zip(edges, gradients, strict=True))
    return [by_node[op.output.node] for op in ops]


def _ends(n: int) -> list[Tensor]:
    """(n,) each: 1 for the first sequence alone, and for the last."""
    return [(torch.arange(n) == one).float() for one in sorted({0, n - 1})]


def _digit_factors(n: int) -> list[Tensor]:
    """(n,) each: ones, and powers of 2, which round nothing, by a digit of a sequence's number."""
    number, found = torch.arange(n), [torch.ones(n)]
    while len(found) < 2 or number.any():
        found.append(2.0 ** (number % _BASE))
        number = number // _BASE
    return found


def _overlapping(params: Sequence[ParamView]) -> set[str]:
    """Names with two different views that share entries."""
    names = set()
    spans = sorted((p.name, p.start, p.start + math.prod(p.shape)) for p in params)
    for (name, _, stop), (next_name, start, _) in itertools.pairwise(spans):
        if name == next_name and start < stop:
            names.add(name)
    return names


@dataclasses.dataclass(frozen=True)
class TiedEmbeddingGrad:
    """Lookups of the output layer's own weight: their square and the cross term with the output.

    `beta` (U, R) by segment and probe, `hidden` (n, D) twice h.
    """

    grad: ParamGrad
    segments: LookupSegments
    beta: Tensor
    hidden: Tensor

    def add_square_(self, fisher: Tensor, probes: slice, deltas: Sequence[Tensor | None]) -> None:
        """fisher[v] += Σ_r S_v^r ∘ (S_v^r + 2 β_vr h) of some probes."""
        beta = self.beta[:, probes].contiguous()
        delta = self.grad.joined_delta(deltas, beta.shape[1]).to(self.hidden.dtype)
        delta = delta.reshape(len(delta), -1, delta.shape[-1])
        kernels.lookup_square_(fisher, delta, self.segments, beta, self.hidden)


def tied_embedding_grads(
    plan: Plan,
    index: Tensor,
    weight: ParamView | None,
    stats: SoftmaxStats,
    factor: CovarianceFactor,
) -> dict[int, TiedEmbeddingGrad]:
    """By index in the plan, the gradients that look up rows of the output weight's parameter.

    F_v = Σ_n [ (output part)² + Σ_r (S_v^r)² + 2 h ∘ Σ_r β_vr S_v^r ]; the first is in closed
    form with the output layer, S_v^r is the lookup's gradient of probe r. `index` (n,): the
    sequences of the pass.
    """
    if weight is None:
        return {}
    tied = {}
    for i, grad in enumerate(plan.grads):
        if grad.param.name != weight.name:
            continue
        lookup = grad.joined_lookup()
        shift = (weight.start - grad.param.start) // weight.shape[1]
        items, outside = stats.table.columns(lookup.ids, shift)
        beta = factor.tied_cross_term(index, items).to(stats.h.dtype)
        beta = beta.masked_fill_(outside[:, :, None], 0.0).flatten(0, 1)
        segments = lookup.by_row
        # Every position of a segment has its pair's β; an empty one may have any.
        first = segments.segment_start[:-1].clamp(max=len(beta) - 1)
        beta = beta[segments.order[first]]
        tied[i] = TiedEmbeddingGrad(grad, segments, beta, 2 * stats.h[index])
    return tied
