"""K items of every row drawn from its softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.ops import counter
from fisherkern.ops._dispatch import use_triton
from fisherkern.ops._library import register
from fisherkern.ops.softmax_lse import logit_tiles, reference_logits


def _sample_items(
    h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor, rows: Tensor, k: int, seed: int
) -> Tensor:
    if use_triton(h, weight, bias, lse):
        from fisherkern.ops import sample_items_triton

        return sample_items_triton.sample_items(h, weight, bias, lse, rows, k, seed)
    u = counter.uniform(seed, rows, torch.arange(k, device=h.device))
    ids = torch.zeros(h.shape[0], k, dtype=torch.int64, device=h.device)
    below = torch.zeros(h.shape[0], 1, dtype=torch.float64, device=h.device)
    for _, _, z in logit_tiles(h, weight, bias):
        # fp64, because ten million fp32 terms would not add up to one.
        cdf = below + torch.cumsum((z - lse[:, None]).exp().double(), dim=1)
        # The number of cdf values <= u, summed over the tiles, is the item drawn.
        ids += torch.searchsorted(cdf, u, right=True)
        below = cdf[:, -1:]
    return ids.clamp_(max=weight.shape[0] - 1)


def _fake(
    h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor, rows: Tensor, k: int, seed: int
) -> Tensor:
    return h.new_empty((h.shape[0], k), dtype=torch.int64)


_op = register(
    "sample_items(Tensor h, Tensor weight, Tensor? bias, Tensor lse, Tensor rows, int k, int seed)"
    " -> Tensor",
    _sample_items,
    _fake,
)


def sample_items(
    h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor, rows: Tensor, k: int, seed: int
) -> Tensor:
    """k independent draws from softmax(h Wᵀ + b) for every row, with replacement.

    h (N, D), weight (V, D), bias (V,) or None, lse (N,) from `softmax_lse`, rows
    (N,) int64: each sequence's number, which keys its random numbers together with
    the seed. Returns ids (N, k) int64 by inversion of the streamed cumulative
    distribution: the result depends on (seed, row), not on the batch or the tile,
    up to rounding of a cumulative sum next to a draw.
    """
    return _op(h, weight, bias, lse, rows, k, seed)


def sample_items_reference(
    h: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, k: int, seed: int
) -> Tensor:
    """The fp64 twin of `sample_items`; holds all probabilities."""
    cdf = reference_logits(h, weight, bias).softmax(dim=1).cumsum(dim=1)
    u = counter.uniform(seed, rows, torch.arange(k, device=h.device))
    return torch.searchsorted(cdf, u, right=True).clamp_(max=weight.shape[0] - 1)
