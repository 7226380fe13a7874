"""Soups whose lambda is learned on validation data."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from fisherkern.members.options import Number
from fisherkern.merging.rules.base import MergeBlock, merge_method
from fisherkern.merging.rules.fisher import fisher_average


@merge_method(
    "layer_wise",
    title="Layer-wise learned soup",
    source="https://arxiv.org/abs/2310.02575",
    needs=("validation",),
    takes=("fishers",),
    choose="learned by layer",
)
@merge_method(
    "learned_soup",
    title="Learned soup",
    source="https://arxiv.org/abs/2203.05482",
    needs=("validation",),
    takes=("fishers",),
    choose="learned",
)
def learned_soup(
    block: MergeBlock,
    *,
    lr: Annotated[float, Number(0.0, above=True)] = 0.05,
    temperature: Literal["learned", "fixed"] = "learned",
) -> Tensor:
    """Return `fisher_average`; `learned.learn_weights` finds lambda and uses the options."""
    return fisher_average(block)
