"""Lookups of the output layer's own weight: their square and the cross term with the output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from fisherkern import ops
from fisherkern.fisher.capture import Place
from fisherkern.fisher.factor import Factor
from fisherkern.fisher.passes import Pass
from fisherkern.fisher.plan import Group
from fisherkern.fisher.samplers import Rows
from fisherkern.ops.lookup_square import LookupSegments


@dataclasses.dataclass(frozen=True)
class TiedLookup:
    """The lookups of one pass; beta (U, R) by segment and probe, hidden (n, D) twice h."""

    group: Group
    segments: LookupSegments
    beta: Tensor
    hidden: Tensor

    def add_square_(self, fisher: Tensor, probes: slice, deltas: Sequence[Tensor | None]) -> None:
        beta = self.beta[:, probes].contiguous()
        delta = self.group.joined_delta(deltas, beta.shape[1]).to(self.hidden.dtype)
        delta = delta.reshape(len(delta), -1, delta.shape[-1])
        ops.lookup_square_(fisher, delta, self.segments, beta, self.hidden)


def tied_lookups(
    forward: Pass, weight: Place | None, rows: Rows, factor: Factor
) -> dict[int, TiedLookup]:
    """By number, the groups of the pass that look up rows of the output weight's parameter.

    F_v = Σ_n [ (output part)² + Σ_r (S_v^r)² + 2 h ∘ Σ_r β_vr S_v^r ]; the first
    is in closed form with the head, S_v^r is the lookup's gradient of probe r.
    """
    if weight is None:
        return {}
    found = {}
    for number, group in enumerate(forward.plan.groups):
        if group.place.name != weight.name:
            continue
        lookup = group.joined_lookup()
        items = lookup.ids - (weight.start - group.place.start) // weight.shape[1]
        outside = (lookup.ids < 0) | (items < 0) | (items >= weight.shape[0])
        beta = factor.cross(forward.which, items.masked_fill(outside, 0)).to(rows.h.dtype)
        beta = beta.masked_fill_(outside[:, :, None], 0.0).flatten(0, 1)
        segments = lookup.by_row
        # Every position of a segment has its pair's β; an empty one may have any.
        first = segments.segment_start[:-1].clamp(max=len(beta) - 1)
        beta = beta[segments.order[first]]
        found[number] = TiedLookup(group, segments, beta, 2 * rows.h[forward.which])
    return found
