"""Which Fisher says best what a network can do without: pruning without training after it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import RowBuilders
from benchmarks.experiments.free_fisher import FreeFisher
from benchmarks.experiments.member_set import EXACT, FREE, Estimate, MemberSet
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError

MAGNITUDE = Estimate("magnitude")


@dataclasses.dataclass(frozen=True)
class Pruning(FreeFisher):
    """Set the weights of a trained network to zero that cost least, by each Fisher.

    A weight costs F θ² (optimal brain damage), or θ² by magnitude; a share of all weights goes,
    wherever they stand. The network is the base, and nothing is trained after.

    Args:
        share: share of the weights that are set to zero.
    """

    share: float = 0.5

    NAME: ClassVar = "pruning"
    ENSEMBLE: ClassVar = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise InputError(f"share: must be in (0, 1), got {self.share}")

    def title(self, estimate: Estimate) -> str:
        return f"pruned by {estimate}"

    def references(self) -> dict[str, Sequence[str]]:
        return {
            "whole": ["base"],
            "magnitude": [self.title(MAGNITUDE)],
            "free Fisher": [self.title(FREE)],
        }

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        base = partial(self.base_model, cache)
        alone = MemberSet(cache, {"base": base}, self.fisher_sequences)
        rows: RowBuilders = {"base": base}
        for estimate in (MAGNITUDE, FREE, EXACT):
            title = self.title(estimate)
            build = partial(self.pruned, alone, estimate)
            rows[title] = partial(cache.model, title, build)
        return rows

    def extra_columns(self, cache: ArtifactCache) -> Mapping[str, Callable[[], dict[str, float]]]:
        return {}

    def pruned(self, alone: MemberSet, estimate: Estimate) -> SequenceEncoder:
        """The network without the weights that cost least."""
        (model,) = alone.models()
        fisher = None if estimate == MAGNITUDE else alone.fishers(estimate)[0]
        return without_cheapest(model, fisher, self.share)


def without_cheapest(
    model: SequenceEncoder, fisher: Mapping[str, Tensor] | None, share: float
) -> SequenceEncoder:
    """A copy whose `share` of weights of least F θ² is zero; F = 1 without a Fisher."""
    result = copy.deepcopy(model)
    weights = dict(result.named_parameters())
    costs = {
        name: weight.detach().square() * (1 if fisher is None else fisher[name])
        for name, weight in weights.items()
    }
    order = torch.argsort(torch.cat([cost.flatten() for cost in costs.values()]), stable=True)
    keep = torch.ones(len(order), dtype=torch.bool)
    keep[order[: round(share * len(order))]] = False
    parts = keep.split([weight.numel() for weight in weights.values()])
    with torch.no_grad():
        for weight, part in zip(weights.values(), parts, strict=True):
            weight.mul_(part.view(weight.shape))
    return result
