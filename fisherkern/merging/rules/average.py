"""The average of the members."""

from __future__ import annotations

from torch import Tensor

from fisherkern.merging.rules.base import MergeBlock, convex, merge_method


@merge_method(
    "weighted",
    title="Weighted average",
    source="https://arxiv.org/abs/2203.05482",
    needs=("weights",),
)
@merge_method("uniform", title="Uniform average", source="https://arxiv.org/abs/2203.05482")
def average(block: MergeBlock) -> Tensor:
    """Return theta* = sum_m lambda_m theta_m / sum_m lambda_m, over the owners of each row."""
    return convex(block.theta, block.weights)
