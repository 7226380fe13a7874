"""A sketch of the covariance by one pass over the items, for any catalogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherkern.fisher.factors.factor import CovarianceFactor, stored_vectors
from fisherkern.fisher.settings import Settings
from fisherkern.ops import counter_rng


def streamed_sketch(stats: Any, settings: Settings) -> CovarianceFactor:
    """Return the factor whose columns are sums of items with random signs."""
    assert settings.probes is not None
    probes, seed = settings.probes, settings.seed
    inputs = stats.h, stats.lse, stats.mean, stats.sequence_ids
    u, totals = stats.table.sketch(*inputs, probes, seed)
    saturated, others = stats.saturated, totals
    if saturated is not None:
        columns, rest = saturated.sketch(stats.sequence_ids, probes, seed)
        u = u.index_copy(0, saturated.rows, columns.to(u.dtype))
        others = totals.index_copy(0, saturated.rows, rest.to(u.dtype))

    def cross(sequence: Tensor, items: Tensor) -> Tensor:
        log_p = stats.log_probability(sequence, items)
        ids, item = torch.broadcast_tensors(stats.sequence_ids[sequence][:, None], items)
        signs = counter_rng.random_signs_at(seed, ids, item, u.dtype)
        bucket = counter_rng.bucket_of(seed, items, probes)
        signed = (0.5 * log_p).exp() * signs
        total = totals[sequence][:, None]
        if saturated is not None:
            # s_t (1 − p_t) − p_t Σ_{v≠t} s_v: of an item with nearly all the mass nothing cancels.
            place = saturated.place[sequence][:, None]
            top = (items == saturated.item[place]) & (place >= 0)
            signed = torch.where(top, signed * saturated.rest[place].to(u.dtype), signed)
            total = torch.where(top[:, :, None], others[sequence][:, None], total)
        beta: Tensor = -log_p.exp()[:, :, None] * total
        # One entry of each (sequence, item): no order to keep.
        return beta.scatter_add_(2, bucket[:, :, None], signed[:, :, None])

    return CovarianceFactor(probes=probes, probe_vectors=stored_vectors(u), tied_cross_term=cross)
