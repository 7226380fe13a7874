"""Model Stock: between the base and the members' average, by the angle between task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern.merging.rules.base import MergeBlock, TensorBlocks, merge_method
from fisherkern.merging.rules.task_vectors import from_base


def stock_ratios(
    tensors: Mapping[str, TensorBlocks], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return t, 0-dim, per tensor; the angle is over the rows that all members and the base own."""
    found = {}
    for name, blocks in tensors.items():
        gram = torch.zeros(blocks.members, blocks.members, dtype=torch.float64)
        for x in blocks:
            assert x.base is not None
            tau = torch.where(x.owns.all(0) & x.base_owns, x.theta - x.base, 0.0).flatten(1)
            gram += (tau @ tau.T).cpu()
        found[name] = _ratio(gram)
    return found


@merge_method(
    "model_stock",
    title="Model Stock",
    source="https://arxiv.org/abs/2403.19522",
    needs=("base",),
    prepare=stock_ratios,
)
def model_stock(block: MergeBlock) -> Tensor:
    """Return theta* = theta_0 + t mean_m tau_m, the nearer to the base the less the members agree.

        t = M cos / (1 + (M - 1) cos),   cos = mean_{m<l} max(0, <tau_m, tau_l> / |tau_m| |tau_l|)

    for each tensor, over the rows that all members and the base own. The paper has one angle
    between all pairs; here their cosines are averaged, an obtuse angle or a task vector of zeros
    counting as a right one. Where no member has a task vector there, and for a single member, t is
    1. Rows that some member lacks take their tensor's t and the mean of their owners.

    Source: Jang et al., arXiv 2403.19522.
    """
    return from_base(block, block.stats.to(block.theta.device) * _equal(block))


def _equal(block: MergeBlock) -> Tensor:
    """(M, n, 1): a row's owners alike."""
    return block.weights / block.weights.sum(0)


def _ratio(gram: Tensor) -> Tensor:
    members = len(gram)
    if members == 1 or not gram.any():
        return torch.ones((), dtype=torch.float64)
    length = gram.diagonal().sqrt()
    product = length[:, None] * length
    cosines = torch.where(product > 0, gram / product, 0.0).clamp(0, 1)
    cos = cosines.triu(1).sum() / (members * (members - 1) / 2)
    return members * cos / (1 + (members - 1) * cos)
