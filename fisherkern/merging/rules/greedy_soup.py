"""The greedy soup."""

from __future__ import annotations

from torch import Tensor

from fisherkern.merging.rules.base import MergeBlock, merge_method
from fisherkern.merging.rules.fisher import fisher_average


@merge_method(
    "greedy_soup",
    title="Greedy soup",
    source="https://arxiv.org/abs/2203.05482",
    needs=("score",),
    takes=("fishers",),
    choose="greedy",
)
def greedy_soup(block: MergeBlock) -> Tensor:
    """Return `fisher_average`; lambda is found by `search.greedy_weights`."""
    return fisher_average(block)
