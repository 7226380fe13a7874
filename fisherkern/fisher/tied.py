"""Lookups of the output layer's own weight: their square and the cross term with the output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from fisherkern import ops
from fisherkern.fisher.capture import Place
from fisherkern.fisher.passes import Pass
from fisherkern.fisher.plan import Group
from fisherkern.fisher.samplers import Factor, Rows
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
        segments = group.joined_lookup().by_row
        item = segments.row - (weight.start - group.place.start) // weight.shape[1]
        known = ((item >= 0) & (item < weight.shape[0])).nonzero()[:, 0]
        # The factor takes its pairs sequence by sequence.
        known = known[segments.sequence[known].sort(stable=True).indices]
        sequence = forward.which.to(item.device)[segments.sequence[known]]
        beta = rows.h.new_zeros(len(item), factor.probes)
        beta[known] = factor.cross(sequence, item[known]).to(beta.dtype)
        hidden = 2 * rows.h[forward.which.to(item.device)]
        found[number] = TiedLookup(group, segments, beta, hidden)
    return found
