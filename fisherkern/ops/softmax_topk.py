"""The K most probable items of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.ops._dispatch import use_triton
from fisherkern.ops._library import register
from fisherkern.ops.softmax_lse import logit_tiles, reference_logits

MAX_TRITON_K = 128  # what a program's registers hold of candidates


def _topk_lower_id_first(z: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top k of each row by (value descending, id ascending): (N, C) z and ids -> (N, k) each."""
    values, index = torch.topk(z, k, dim=1)
    # topk breaks ties as it likes; only rows with a tie across the cut need a full sort.
    tied = (z >= values[:, -1:]).sum(dim=1) > k
    if tied.any():
        rows = tied.nonzero().squeeze(1)
        by_id = torch.argsort(ids[rows], dim=1)
        order = torch.argsort(z[rows].gather(1, by_id), dim=1, descending=True, stable=True)
        index[rows] = by_id.gather(1, order)[:, :k]
    chosen_ids, order = torch.sort(ids.gather(1, index), dim=1)
    values = z.gather(1, index).gather(1, order)
    values, order = torch.sort(values, dim=1, descending=True, stable=True)
    return values, chosen_ids.gather(1, order)


def _softmax_topk(
    h: Tensor, weight: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    if k <= MAX_TRITON_K and use_triton(h, weight, bias):
        from fisherkern.ops import softmax_topk_triton

        candidates, places, lse = softmax_topk_triton.softmax_topk(h, weight, bias, k)
        values, ids = _topk_lower_id_first(candidates, places, k)
        # Only a row with NaN has fewer items than k to choose from.
        return (values - lse[:, None]).exp(), ids.clamp_(max=weight.shape[0] - 1), lse
    dtype = torch.promote_types(h.dtype, torch.float32)
    lse = torch.full((h.shape[0],), -torch.inf, dtype=dtype, device=h.device)
    best: Tensor | None = None
    best_ids: Tensor | None = None
    for start, stop, z in logit_tiles(h, weight, bias):
        lse = torch.logaddexp(lse, torch.logsumexp(z, dim=1))
        ids = torch.arange(start, stop, device=h.device).expand(h.shape[0], -1)
        if best is not None and best_ids is not None:
            z, ids = torch.cat((best, z), dim=1), torch.cat((best_ids, ids), dim=1)
        best, best_ids = _topk_lower_id_first(z, ids, min(k, z.shape[1]))
    assert best is not None and best_ids is not None
    return (best - lse[:, None]).exp(), best_ids, lse


def _fake(h: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(h.dtype, torch.float32)
    n = h.shape[0]
    ids = h.new_empty((n, k), dtype=torch.int64)
    return h.new_empty((n, k), dtype=dtype), ids, h.new_empty((n,), dtype=dtype)


_op = register(
    "softmax_topk(Tensor h, Tensor weight, Tensor? bias, int k) -> (Tensor, Tensor, Tensor)",
    _softmax_topk,
    _fake,
)


def softmax_topk(
    h: Tensor, weight: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities and ids of the k largest logits, and the log-sum-exp, in one streamed pass.

    h (N, D), weight (V, D), bias (V,) or None, 1 <= k <= V. Returns p (N, k) in
    descending order, ids (N, k) int64, lse (N,); p and lse are fp32 or wider.
    Ties go to the lower id. Holds one tile of logits and N·k candidates for each
    range of items worked on at once. Above k = 128 every backend takes PyTorch's path.
    """
    return _op(h, weight, bias, k)


def softmax_topk_reference(
    h: Tensor, weight: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The fp64 twin of `softmax_topk`; holds all logits and sorts them."""
    z = reference_logits(h, weight, bias)
    values, ids = torch.sort(z, dim=1, descending=True, stable=True)
    lse = torch.logsumexp(z, dim=1)
    return (values[:, :k] - lse[:, None]).exp(), ids[:, :k], lse
