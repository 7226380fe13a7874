"""Random-sign sketch of every row's item covariance, without forming it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherkern.ops import counter
from fisherkern.ops._dispatch import use_triton
from fisherkern.ops._library import register
from fisherkern.ops.softmax_lse import logit_tiles, reference_logits

MAX_PROBES = 64  # one 64-bit word per (row, item) holds the signs of all probes


def _softmax_sketch(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    mean: Tensor,
    rows: Tensor,
    probes: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    if use_triton(h, weight, bias, lse, mean):
        from fisherkern.ops import softmax_sketch_triton

        return softmax_sketch_triton.softmax_sketch(h, weight, bias, lse, mean, rows, probes, seed)
    n, width = h.shape[0], weight.shape[1]
    sums = torch.zeros(n, probes, width, dtype=lse.dtype, device=h.device)
    totals = torch.zeros(n, probes, dtype=lse.dtype, device=h.device)
    for start, stop, z in logit_tiles(h, weight, bias):
        root = (0.5 * (z - lse[:, None])).exp_()
        bits = counter.random_bits(seed, rows, torch.arange(start, stop, device=h.device))
        w = weight[start:stop].to(lse.dtype)
        for r in range(probes):
            signed = root * counter.signs(bits, r, lse.dtype)
            sums[:, r].addmm_(signed, w)
            totals[:, r] += signed.sum(dim=1)
    sums -= totals[:, :, None] * mean[:, None]
    return sums / math.sqrt(probes), totals


def _fake(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    mean: Tensor,
    rows: Tensor,
    probes: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    n = h.shape[0]
    return lse.new_empty((n, probes, weight.shape[1])), lse.new_empty((n, probes))


_op = register(
    "softmax_sketch(Tensor h, Tensor weight, Tensor? bias, Tensor lse, Tensor mean, Tensor rows,"
    " int probes, int seed) -> (Tensor, Tensor)",
    _softmax_sketch,
    _fake,
)


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
    """u_r = Σ_v sqrt(p(v)) ε_rv (w_v − w̄) / sqrt(R), so that E[Σ_r u_r u_rᵀ] = C.

    h (N, D), weight (V, D), bias (V,) or None, lse (N,), mean (N, D), rows (N,)
    int64 sequence numbers, 1 <= probes <= 64. The signs ε are bit r of a
    counter-based word keyed by (seed, row, item). Returns u (N, R, D) and the sums
    Σ_v sqrt(p(v)) ε_rv (N, R). One streamed pass, N·V·D·R multiply-adds.
    """
    return _op(h, weight, bias, lse, mean, rows, probes, seed)


def softmax_sketch_reference(
    h: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, probes: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The fp64 twin of `softmax_sketch`; holds N·V·R numbers."""
    p = reference_logits(h, weight, bias).softmax(dim=1)
    bits = counter.random_bits(seed, rows, torch.arange(weight.shape[0], device=h.device))
    signs = torch.stack([counter.signs(bits, r, p.dtype) for r in range(probes)], dim=1)
    signed = p.sqrt()[:, None] * signs
    centred = weight.double()[None] - (p @ weight.double())[:, None]
    return torch.einsum("nrv,nvd->nrd", signed, centred) / math.sqrt(probes), signed.sum(dim=2)
