"""The members of Table 2 merged with every estimate of their Fishers: the paper's other tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import RowBuilders
from benchmarks.experiments.fisher_cost import best_scaled_error, relative_error
from benchmarks.experiments.member_set import EXACT, Estimate
from benchmarks.experiments.table2 import Table2
from fisherkern.errors import InputError

ITEMS = (10, 30, 50)  # the paper's n
SAMPLERS = ("topk", "model", "random")  # eqs. 7, 8 and section 3.2.2; "target", eq. 9, has no n
REDUCTIONS = ("sequence", "batchwise")


@dataclasses.dataclass(frozen=True)
class Samplers(Table2):
    """Merge Table 2's members by every estimate of their Fishers.

    There is a row for each sampler of the paper's section 3.2.2, number of items n, and square
    per sequence (eq. 5) or per batch of 256 (eq. 6). Beside it stands the error of the estimate
    against the exact Fisher, the mean over the members. Merges are in units of each Fisher's
    mean, so its scale has no effect: the best-scaled error is the one that counts.

    Args:
        floor: weight of the plain average, of all the merges.
    """

    floor: float = 0.1

    ENSEMBLE: ClassVar = None
    MERGED: ClassVar = ""
    NOTE: ClassVar = (
        "Errors are the mean over the members of the distance from the exact diagonal, as a share"
        " of its norm: after the best rescaling, and as it is. Which of the paper's Tables 3 to 5"
        " varies the sampler, n and the batch-wise computation, and with which figures, we have"
        " not seen, so none stand here."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.floor >= 0:
            raise InputError(f"floor: must not be negative, got {self.floor}")

    def estimates(self, cache: ArtifactCache) -> list[Estimate]:
        """All of them; of the items no more than the catalogue has."""
        sizes = [n for n in ITEMS if n <= cache.data.num_items]
        return [
            EXACT,
            *(Estimate(s, n, r) for s in SAMPLERS for r in REDUCTIONS for n in sizes),
            *(Estimate("target", None, r) for r in REDUCTIONS),
        ]

    def paper_numbers(self) -> Mapping[str, str]:
        return {}

    def references(self) -> dict[str, Sequence[str]]:
        return {"uniform merge": ["uniform merge"], "exact": [self.title(EXACT)]}

    def title(self, estimate: Estimate) -> str:
        return f"Fisher merge, {estimate}, floor {self.floor:g}"

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        member_set = self.member_set(cache)
        rows = member_set.merge("uniform merge", method="uniform")
        rows |= member_set.fisher_merges(self.estimates(cache), [self.floor])
        return {**rows, **self.extra_trained(cache, rows)}

    def extra_columns(self, cache: ArtifactCache) -> Mapping[str, Callable[[], dict[str, float]]]:
        return {
            self.title(estimate): partial(self.errors, cache, estimate)
            for estimate in self.estimates(cache)
            if estimate != EXACT
        }

    def errors(self, cache: ArtifactCache, estimate: Estimate) -> dict[str, float]:
        member_set = self.member_set(cache)
        pairs = list(zip(member_set.fishers(estimate), member_set.fishers(EXACT), strict=True))
        kinds = {"error, best-scaled": best_scaled_error, "error, unscaled": relative_error}
        return {
            title: sum(error(fisher, exact) for fisher, exact in pairs) / len(pairs)
            for title, error in kinds.items()
        }
