"""Random sketch of every row's item covariance, without forming it.

Items are dealt into R buckets and their vectors summed with random signs, a bucket a probe:
u_r = Σ_{v in bucket r} sqrt(p_v) ε_v (w_v − w̄) (CountSketch: Charikar, Chen and
Farach-Colton, ICALP 2002; as a map of matrices: Clarkson and Woodruff, STOC 2013). Every
item enters one probe, so that a sketch costs one matrix product whatever R is. With
independent signs of mean zero E[Σ_r u_r u_rᵀ] = C for any buckets. For a direction x and
a_v = sqrt(p_v) (w_v − w̄)·x the variance of Σ_r (u_r·x)² is 2 Σ_{v≠v'} a_v² a_v'² P(v, v'
meet), at most 2/R (Σ_v a_v²)²: what R dense sign vectors would have, at R times the work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherkern.ops import counter_rng
from fisherkern.ops.backend import use_triton
from fisherkern.ops.library import register_op
from fisherkern.ops.products import add_product_
from fisherkern.ops.softmax_lse import LogitProduct, exp_minus_, reference_logits, tile_rows


def _outputs(lse: Tensor, mean: Tensor, probes: int, **_: Any) -> tuple[Tensor, Tensor]:
    n = len(lse)
    return lse.new_empty((n, probes, mean.shape[1])), lse.new_empty((n, probes))


@register_op(_outputs)
def softmax_sketch(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    mean: Tensor,
    rows: Tensor,
    probes: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Sketch every row's item covariance C: R random vectors whose squares have C as expectation.

        u_r = Σ_{v in bucket r} sqrt(p(v)) ε_v (w_v − w̄),   E[Σ_r u_r u_rᵀ] = C

    The signs ε are `counter_rng.random_signs_at` of (seed, row, item), the buckets
    `counter_rng.bucket_of` of (seed, item), the same for all rows. One streamed pass of two matrix
    products of N·V·D, whatever R. Exact for R >= V.

    Args:
        h: (N, D) hidden states.
        weight: (V, D) item vectors.
        bias: (V,), or None for none.
        lse: (N,) from `softmax_mean`.
        mean: (N, D) from `softmax_mean`.
        rows: (N,) int64, the sequences' ids, which key the signs.
        probes: R, at least 1.
        seed: Key of the random numbers.

    Returns:
        u (N, R, D) and the sums Σ_{v in bucket r} sqrt(p(v)) ε_v (N, R), of lse's dtype.

    Source: CountSketch: Charikar, Chen and Farach-Colton, ICALP 2002.
    """
    if use_triton("softmax_sketch", h, weight, bias, lse, mean):
        from fisherkern.ops import softmax_sketch_triton

        return softmax_sketch_triton.softmax_sketch(h, weight, bias, lse, mean, rows, probes, seed)
    sums, totals = sketch_sums(h, weight, bias, lse, rows, probes, seed)
    sums -= totals[:, :, None] * mean[:, None]
    return sums, totals


def sketch_sums(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    rows: Tensor,
    probes: int,
    seed: int,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return Σ_v sqrt(p(v)) ε_v w_v (N, R, D), also without w_v (N, R), of items from `first`."""
    n, width = h.shape[0], weight.shape[1]
    sums = torch.zeros(n, probes, width, dtype=lse.dtype, device=h.device)
    totals = torch.zeros(n, probes, dtype=lse.dtype, device=h.device)
    step = tile_rows(h)
    product = LogitProduct(h, step)
    for r, members in enumerate(
        counter_rng.members_by_bucket(seed, probes, first, len(weight), h.device)
    ):
        for items in members.split(step):
            w = weight.index_select(0, items - first).to(lse.dtype)
            z = product(w, None if bias is None else bias[items - first])
            signed = exp_minus_(z, lse[:, None], 0.5)
            counter_rng.apply_random_signs_(signed, seed, rows, items)
            add_product_(sums[:, r], signed, w)
            totals[:, r] += signed.sum(dim=1)
    return sums, totals


def softmax_sketch_reference(
    h: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, probes: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Compute the fp64 twin of `softmax_sketch`; holds N·V·R numbers."""
    p = reference_logits(h, weight, bias).softmax(dim=1)
    items = torch.arange(weight.shape[0], device=h.device)
    row, item = torch.broadcast_tensors(rows[:, None], items[None, :])
    signed = p.sqrt() * counter_rng.random_signs_at(seed, row, item, p.dtype)
    bucket = counter_rng.bucket_of(seed, items, probes)
    mine = bucket[None] == torch.arange(probes, device=h.device)[:, None]
    signed = signed[:, None] * mine
    centred = weight.double()[None] - (p @ weight.double())[:, None]
    return torch.einsum("nrv,nvd->nrd", signed, centred), signed.sum(dim=2)
