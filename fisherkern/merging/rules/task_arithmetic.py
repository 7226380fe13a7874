"""Task arithmetic."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from fisherkern.members.options import Number
from fisherkern.merging.rules.base import MergeBlock, merge_method
from fisherkern.merging.rules.task_vectors import from_base, relative_weights


@merge_method(
    "task_arithmetic",
    title="Task arithmetic",
    source="https://arxiv.org/abs/2212.04089",
    needs=("base",),
    takes=("weights",),
)
def task_arithmetic(block: MergeBlock, *, scale: Annotated[float, Number(0.0)] = 0.3) -> Tensor:
    """Return theta* = theta_0 + scale sum_m (M lambda_m) tau_m.

    Source: Ilharco et al., arXiv 2212.04089; lambda equal there.
    """
    return from_base(block, scale * relative_weights(block))
