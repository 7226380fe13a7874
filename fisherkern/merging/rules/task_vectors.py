"""Task vectors tau_m = theta_m - theta_0, from the base model that the members started from."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.merging.rules.average import average
from fisherkern.merging.rules.base import MergeBlock


def from_base(block: MergeBlock, share: Tensor) -> Tensor:
    """Return theta_0 + sum_m share_m (theta_m - theta_0), share (M, n, c) non-negative.

    A row the base lacks has no task vector: its owners are averaged by lambda. Where the shares
    sum to at most 1 this is a convex combination with the base and held within it, as in
    `convex`; a member whose share is 1 comes back bit for bit.
    """
    base = block.base
    assert base is not None
    share = torch.where(block.owns, share, 0.0).expand_as(block.theta)
    total = share.sum(0)
    merged = base + (share * (block.theta - base)).sum(0)
    # Rounding in shares that sum to 1 is no share of the base's.
    rest = total < 1 - 1e-12
    used = share > 0
    low = torch.where(used, block.theta, torch.inf).amin(0)
    high = torch.where(used, block.theta, -torch.inf).amax(0)
    low = torch.where(rest, torch.minimum(low, base), low)
    high = torch.where(rest, torch.maximum(high, base), high)
    merged = torch.where(total > 1 + 1e-12, merged, merged.clamp(low, high))
    return torch.where(block.base_owns, merged, average(block))


def relative_weights(block: MergeBlock) -> Tensor:
    """Return (M, 1, 1) lambda in units of 1/M: 1 each where the members count alike."""
    return block.lam[:, None, None] * block.members
