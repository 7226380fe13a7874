"""The merge rules: each takes one tensor of every member and gives the merged tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operands:
    """What a rule may use to merge a block of n rows and c columns of one tensor.

    theta: (M, n, c) float64, the members' values; a row a member does not own holds zeros.
    weights: (M, n, 1) float64, lambda; 0 in the rows a member does not own, and in every row
        at least one owner has a positive weight.
    fisher: (M, n, c) float64, non-negative, each member's in units of its mean (see `merge`);
        None where the Fisher says nothing about this tensor.
    floor: the relative floor, in the same unit.
    """

    theta: Tensor
    weights: Tensor
    fisher: Tensor | None
    floor: float


@dataclass(frozen=True)
class Rule:
    """A merge rule: `function` maps Operands to the merged (n, c) float64 block."""

    function: Callable[[Operands], Tensor]
    takes_weights: bool
    takes_fishers: bool


def convex(theta: Tensor, share: Tensor) -> Tensor:
    """sum_m share_m theta_m / sum_m share_m over dimension 0, within the members' range.

    theta (M, n, c), share broadcastable to it, non-negative with a positive sum.
    """
    merged = (share * theta).sum(0) / share.sum(0)
    # A convex combination lies between its members. Holding it there takes the rounding out:
    # equal members, or a single one with a share, come back bit for bit.
    counts = share > 0
    low = torch.where(counts, theta, torch.inf).amin(0)
    high = torch.where(counts, theta, -torch.inf).amax(0)
    return merged.clamp(low, high)


def average(x: Operands) -> Tensor:
    """theta* = sum_m lambda_m theta_m / sum_m lambda_m, over the owners of each row."""
    return convex(x.theta, x.weights)


def fisher_average(x: Operands) -> Tensor:
    """theta* = sum_m lambda_m (F_m + floor) theta_m / sum_m lambda_m (F_m + floor).

    Where the denominator is 0 (floor 0 and no information), or there is no Fisher: `average`.
    Source: Matena and Raffel, arXiv 2111.09832, with a floor that is relative to the mean.
    """
    if x.fisher is None:
        return average(x)
    share = x.weights * (x.fisher + x.floor)
    share = torch.where(share.sum(0) > 0, share, x.weights)
    return convex(x.theta, share)


RULES: dict[str, Rule] = {
    "uniform": Rule(average, takes_weights=False, takes_fishers=False),
    "weighted": Rule(average, takes_weights=True, takes_fishers=False),
    "fisher": Rule(fisher_average, takes_weights=True, takes_fishers=True),
}
