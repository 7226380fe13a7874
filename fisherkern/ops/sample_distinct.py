"""K distinct items of every row from its softmax: Gumbel-top-k, range by range.

With independent Gumbel noise the k items of largest log p(v) + g_v are k draws without
replacement (Kool, van Hoof and Welling, ICML 2019). Let κ be the (k+1)-th largest value and
q(v) = P(log p(v) + g > κ) = 1 − exp(−p(v) e^−κ). With weights ω_v = p(v) / q(v)

    E[Σ_{v drawn} ω_v f(v)] = Σ_v p(v) f(v)

for every f (priority sampling: Duffield, Lund and Thorup, J. ACM 2007; with Gumbel noise
Vieira 2017 and Kool et al., ICLR 2020, the importance-weighted estimator). The
weights are not normalised: dividing by their sum would bias the estimate.

Noise for every item would cost more than the logits do. The largest value of a range of
items is itself log p(range) + a Gumbel number, and the k+1 largest items lie in the k+1
ranges with the largest maxima. So maxima are drawn for all ranges, and for those few the
items' values given the maximum M (Kool et al. 2019, section 3.2; Z the maximum of the
unconditioned values G_v): −log(e^−M − e^−Z + e^−G_v). The distribution is that of
independent noise for every item, by Maddison, Tarlow and Minka's top-down construction
(A* sampling, NeurIPS 2014).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherkern.ops import counter_rng
from fisherkern.ops.backend import use_triton
from fisherkern.ops.library import register_op
from fisherkern.ops.sample_items import range_logits, row_blocks
from fisherkern.ops.softmax_lse import RANGE, reference_logits


def range_maxima(log_mass: Tensor, parts: Tensor, rows: Tensor, seed: int) -> Tensor:
    """Return the ranges' largest perturbed values (N, P) of log_mass (N, P) fp64, rows (N,)."""
    # Ranges take the columns below zero: no item has them.
    return log_mass + counter_rng.gumbel_at(seed, rows[:, None], -1 - parts[None, :])


def given_maximum(perturbed: Tensor, highest: Tensor, maximum: Tensor) -> Tensor:
    """Values (..., RANGE) fp64 of ranges, `highest` (...) their largest, with another maximum."""
    highest = highest[..., None]
    # Kool et al. 2019, appendix B.3: no exponential that overflows, no difference that cancels.
    rest = torch.log1p(-(perturbed - highest).exp_())
    v = maximum[..., None] - perturbed + rest
    values = maximum[..., None] - v.clamp(min=0) - torch.log1p((-v.abs()).exp_())
    # Impossible items, with −inf − −inf above, stay impossible.
    return torch.where(perturbed == -torch.inf, -torch.inf, values)


def distinct_from_ranges(
    log_mass: Tensor,
    log_p_of: Callable[[Tensor], Tensor],
    rows: Tensor,
    num_items: int,
    k: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """(ids (N, k) int64, ω (N, k) fp64) for k < num_items.

    log_mass (N, P) fp64: log p of each range; log_p_of(parts (N, m)) -> the items' log p
    (N, m, RANGE), −inf past the last item; rows (N,): sequence numbers.
    """
    every = torch.arange(log_mass.shape[1], device=rows.device)
    maxima = range_maxima(log_mass, every, rows, seed)
    maximum, parts = torch.topk(maxima, min(k + 1, maxima.shape[1]), dim=1)
    items = parts[:, :, None] * RANGE + torch.arange(RANGE, device=rows.device)
    log_p = log_p_of(parts).double()
    values = torch.empty_like(log_p)
    # A few rows at a time: the noise takes a dozen temporaries.
    for few in row_blocks(len(rows), 16 * items[0].numel()):
        perturbed = log_p[few] + counter_rng.gumbel_at(seed, rows[few, None, None], items[few])
        values[few] = given_maximum(perturbed, perturbed.amax(dim=-1), maximum[few])
    # Where fewer than k items are possible, impossible ones of the catalogue fill up.
    values = values.clamp_(min=torch.finfo(values.dtype).min)
    values = values.masked_fill_(items >= num_items, -torch.inf).flatten(1)
    best, place = torch.topk(values, k + 1, dim=1)
    log_p = log_p.flatten(1).gather(1, place[:, :k])
    return items.flatten(1).gather(1, place[:, :k]), unbiased_weights(log_p, best[:, k:])


def unbiased_weights(log_p: Tensor, threshold: Tensor) -> Tensor:
    """ω of items (N, k) with the (k + 1)-th largest value (N, 1) as threshold, fp64."""
    included = -torch.expm1(-(log_p - threshold).exp_())
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() / included)


def _outputs(lse: Tensor, k: int, **_: Any) -> tuple[Tensor, Tensor]:
    shape = len(lse), k
    return lse.new_empty(shape, dtype=torch.int64), lse.new_empty(shape)


@register_op(_outputs)
def sample_distinct(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ranges: Tensor,
    rows: Tensor,
    k: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Draw k different items from every row's softmax, with the weights that make them unbiased.

        E[Σ_j ω_j f(y_j)] = Σ_v p(v) f(v)   for every f

    Noise is keyed by (seed, row, item): the result does not depend on the batch or the tile, up to
    rounding of values next to each other. 256·(k + 1) logits a row, held for some rows at a time.

    Args:
        h: (N, D) hidden states.
        weight: (V, D) item vectors.
        bias: (V,), or None for none.
        lse: (N,) from `softmax_mean`.
        ranges: (N, ⌈V/256⌉) fp64 from `softmax_mean`.
        rows: (N,) int64, the sequences' ids, which key the noise.
        k: Draws per row, 1 to V. k = V gives every item with ω = p.
        seed: Key of the random numbers.

    Returns:
        ids (N, k) int64 in the order drawn, and ω (N, k) of lse's dtype.

    Source: Kool, van Hoof and Welling, ICML 2019 and ICLR 2020.
    """
    n, v = h.shape[0], weight.shape[0]
    logits_of = range_logits
    if use_triton("sample_distinct", h, weight, bias, lse):
        from fisherkern.ops import sample_distinct_triton

        logits_of = sample_distinct_triton.range_logits
    ids = torch.empty(n, k, dtype=torch.int64, device=h.device)
    omega = torch.empty(n, k, dtype=lse.dtype, device=h.device)
    if k == v:
        everything = torch.arange(ranges.shape[1], device=h.device)
        for block in row_blocks(n, ranges.shape[1] * RANGE):
            parts = everything.expand(len(rows[block]), -1)
            z = logits_of(h[block], weight, bias, parts).flatten(1)[:, :v]
            omega[block] = (z - lse[block, None]).exp_()
            ids[block] = torch.arange(v, device=h.device)
        return ids, omega
    for block in row_blocks(n, max(ranges.shape[1], (k + 1) * RANGE)):

        def log_p_of(parts: Tensor, block: slice = block) -> Tensor:
            return logits_of(h[block], weight, bias, parts) - lse[block, None, None]

        log_mass = ranges[block] - lse[block, None].double()
        found = distinct_from_ranges(log_mass, log_p_of, rows[block], v, k, seed)
        ids[block], omega[block] = found
    return ids, omega


def sample_distinct_reference(
    h: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, k: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Compute the fp64 twin of `sample_distinct`: the noise of all items, then one sort."""
    log_p = reference_logits(h, weight, bias).log_softmax(dim=1)
    items = torch.arange(log_p.shape[1], device=h.device)
    noisy = log_p + counter_rng.gumbel_at(seed, rows[:, None], items)
    parts = []
    for r, (own, noise) in enumerate(
        zip(log_p.split(RANGE, dim=1), noisy.split(RANGE, dim=1), strict=True)
    ):
        gumbel = counter_rng.gumbel_at(seed, rows, torch.full_like(rows, -1 - r))
        top, highest = own.logsumexp(dim=1) + gumbel, noise.amax(dim=1)
        inner = (-top).exp()[:, None] - (-highest).exp()[:, None] + (-noise).exp()
        parts.append(-inner.log())
    values, ids = torch.sort(torch.cat(parts, dim=1), dim=1, descending=True)
    if k == log_p.shape[1]:
        return items.expand(len(rows), -1), log_p.exp()
    p = log_p.gather(1, ids[:, :k]).exp()
    return ids[:, :k], p / (1 - (-p * (-values[:, k : k + 1]).exp()).exp())
