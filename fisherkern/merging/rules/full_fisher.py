"""Merging by the whole Fisher matrix: the point that the solver starts from."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from fisherkern.members.options import Number
from fisherkern.merging.rules.average import average
from fisherkern.merging.rules.base import MergeBlock, merge_method


@merge_method(
    "full_fisher",
    title="Full-Fisher merge",
    source="https://arxiv.org/abs/2312.04339",
    needs=("fishers", "products"),
    takes=("weights",),
)
def full_fisher(block: MergeBlock, *, tol: Annotated[float, Number(0.0)] = 1e-6) -> Tensor:
    """Return `average`, which stays where the Fisher says nothing.

    `full_fisher.solve_full_fisher` goes on from there until the residual falls below `tol`.
    """
    return average(block)
