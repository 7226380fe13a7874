"""Does an exact Fisher merge better than the optimiser's second moments, which cost nothing?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import RowBuilders
from benchmarks.experiments.fisher_cost import best_scaled_error, relative_error
from benchmarks.experiments.member_set import EXACT, FREE, Estimate, MemberSet
from benchmarks.experiments.splits import CONTROL, WEIGHTED, Splits
from fisherkern import linear_grams
from fisherkern.encoders import SASRec, SequenceEncoder
from fisherkern.fisher import DiagFisher
from fisherkern.fisher.factored import factor, multiplied
from fisherkern.objectives import NextItem, Objective

FLOORS = (0.1, 1.0)
TABLE = 1 << 17  # entries of a matrix that is an item table
FREE_WEIGHTED = f"Fisher merge {WEIGHTED}, {FREE}"


def titles(estimate: Estimate) -> list[str]:
    """The rows of an estimate."""
    return [f"Fisher merge, {estimate}, floor {floor:g}" for floor in FLOORS]


def weighted_titles(estimate: Estimate) -> list[str]:
    """The rows of an estimate weighted by users, which parts of other sizes have besides."""
    start = FREE_WEIGHTED if estimate == FREE else f"Fisher merge {WEIGHTED}"
    return [f"{start}, floor {floor:g}" for floor in FLOORS]


@dataclasses.dataclass(frozen=True)
class FreeFisher(Splits):
    """Merge members by exact Fishers, by their optimisers' second moments, and by neither.

    The members are SASRecs that fine-tune a common base on parts of the data. Each kind of
    Fisher has two floors; the one that is better on validation is compared with. The control
    goes on from the base on all data, its rate decayed, for as many windows as all members.

    Args:
        schedule: "linear", a member's learning rate decays to zero, or "constant".
    """

    schedule: str = "linear"

    NAME: ClassVar = "free-fisher"
    PRESETS: ClassVar = {
        "ml-1m": {"dropout": 0.2, "lr": 1e-3, "base_epochs": 30, "member_epochs": 20},
        "beauty": {
            "max_len": 50,
            "dropout": 0.5,
            "batch_size": 128,
            "lr": 1e-3,
            "base_epochs": 20,
            "member_epochs": 20,
        },
    }

    def references(self) -> dict[str, Sequence[str]]:
        weighted = weighted_titles(FREE) if self.size_ratio < 1 else []
        return {
            "best member": self.names(),
            "uniform merge": ["uniform merge"],
            "free Fisher": [*titles(FREE), *weighted],
            "all data": [CONTROL],
        }

    def objective(self) -> Objective:
        return NextItem()

    def schedule_of_members(self) -> str:
        return self.schedule

    def untrained(self, cache: ArtifactCache, *, offset: int = 0) -> SequenceEncoder:
        return cache.fresh(SASRec, offset=offset, **self.sizes())

    def fisher_rows(self, member_set: MemberSet) -> RowBuilders:
        rows: RowBuilders = dict(member_set.fisher_merges((EXACT, FREE), FLOORS))
        if self.size_ratio < 1:
            users = [member_set.data_of(name).num_users for name in member_set.members]
            rows |= member_set.fisher_merges((FREE,), FLOORS, title=FREE_WEIGHTED, weights=users)
        for estimate in (EXACT, FREE):
            rows |= member_set.merge(
                f"Fisher merge, {estimate}, item tables of rank 1, floor 0.1",
                method="fisher",
                fishers=partial(self.of_rank_one, member_set, estimate),
                floor=0.1,
            )
        if self.by == "regions":
            return rows

        def grams() -> list[Any]:
            return [
                linear_grams(
                    build(),
                    member_set.data_of(name).loader(
                        split="train", max_len=self.max_len, limit=self.fisher_sequences
                    ),
                    progress=False,
                )
                for name, build in member_set.members.items()
            ]

        return {**rows, **member_set.merge("RegMean", method="regmean", grams=grams)}

    def of_rank_one(self, member_set: MemberSet, estimate: Estimate) -> list[DiagFisher]:
        """The Fishers as `DiagFisher.save(factored=...)` keeps them."""
        found = []
        for fisher in member_set.fishers(estimate):
            tensors, names = factor(fisher, TABLE)
            whole = multiplied(tensors, {"factored": names}, "memory")
            found.append(DiagFisher(whole, fisher.meta))
        return found

    def extra_columns(self, cache: ArtifactCache) -> Mapping[str, Callable[[], dict[str, float]]]:
        return {title: partial(self.errors, cache) for title in titles(FREE)}

    def errors(self, cache: ArtifactCache) -> dict[str, float]:
        """The free Fishers' errors against the exact ones, the mean over the members."""
        member_set = self.member_set(cache)
        pairs = list(zip(member_set.fishers(FREE), member_set.fishers(EXACT), strict=True))
        kinds = {"error, best-scaled": best_scaled_error, "error, unscaled": relative_error}
        return {
            title: sum(error(free, exact) for free, exact in pairs) / len(pairs)
            for title, error in kinds.items()
        }
