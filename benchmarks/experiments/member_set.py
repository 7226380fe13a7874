"""The members of an experiment, their Fishers, and the rows of their merges."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.experiments.artifacts import ArtifactCache
from fisherkern import align
from fisherkern.data import SequenceDataset
from fisherkern.encoders import SequenceEncoder
from fisherkern.evaluation import ScoreEnsemble
from fisherkern.fisher import DiagFisher
from fisherkern.objectives import Objective

ModelBuilder = Callable[[], SequenceEncoder]

BY_LOSS = ", aligned by the loss"
# Batches of training windows that the alignment learns from.
ALIGN_STEPS = 600


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The arguments of a Fisher; as text, a part of its artifact's name."""

    sampler: str
    k: int | None = None
    reduction: str = "sequence"

    def __str__(self) -> str:
        items = "" if self.k is None else f" {self.k}"
        return f"{self.sampler}{items}{', batch-wise' * (self.reduction == 'batchwise')}"

    def arguments(self) -> dict[str, Any]:
        k = {} if self.k is None else {"k": self.k}
        return {"sampler": self.sampler, "reduction": self.reduction, **k}


EXACT = Estimate("exact")
# AdamW's second moments at the end of a member's training: the Fisher that costs nothing.
FREE = Estimate("optimizer")


@dataclasses.dataclass(frozen=True)
class MemberSet:
    """Members by name, built when a row needs them.

    data: each member's training data, of which its Fisher is taken as well; None is the cache's.
    sequences: training pairs of every Fisher. suffix: put after the rows' names, for a second set
    in one table. to_catalogue: applied to every merge, where members have catalogues of their own.
    """

    cache: ArtifactCache
    members: Mapping[str, ModelBuilder]
    sequences: int
    data: Mapping[str, SequenceDataset] | None = None
    suffix: str = ""
    to_catalogue: Callable[[SequenceEncoder], SequenceEncoder] | None = None

    def data_of(self, name: str) -> SequenceDataset:
        """A member's training data."""
        return self.cache.data if self.data is None else self.data[name]

    def models(self) -> list[SequenceEncoder]:
        return [build() for build in self.members.values()]

    def fishers(self, estimate: Estimate) -> list[DiagFisher]:
        if estimate == FREE:
            self.models()  # whose trainings leave them
            return [self.cache.free_fisher(name) for name in self.members]
        return [
            self.cache.fisher(
                f"{name}, {estimate}",
                build,
                sequences=self.sequences,
                data=self.data_of(name),
                **estimate.arguments(),
            )
            for name, build in self.members.items()
        ]

    def merge(
        self,
        name: str,
        *,
        fishers: Callable[[], Sequence[Any]] | None = None,
        grams: Callable[[], Sequence[Any]] | None = None,
        base: ModelBuilder | None = None,
        **arguments: Any,
    ) -> dict[str, ModelBuilder]:
        """The row `name` of one merge; takes the arguments of `merge`.

        fishers, grams, base: functions that give those arguments, called when the merge is made.
        """
        name += self.suffix
        makers = {"fishers": fishers, "grams": grams, "base": base}

        def build() -> SequenceEncoder:
            late = {key: make() for key, make in makers.items() if make is not None}
            merged = self.cache.merged(name, self.models(), **arguments, **late)
            return self.over_catalogue(merged)

        return {name: build}

    def fisher_merges(
        self,
        estimates: Sequence[Estimate] = (EXACT,),
        floors: Sequence[float] = (0.1, 1.0),
        *,
        title: str = "Fisher merge",
        weights: Sequence[float] | None = None,
    ) -> dict[str, ModelBuilder]:
        """A row for every estimate and floor; the estimate is named where there are several."""
        rows: dict[str, ModelBuilder] = {}
        for estimate in estimates:
            named = title if len(estimates) == 1 else f"{title}, {estimate}"
            for floor in floors:
                rows |= self.merge(
                    f"{named}, floor {floor:g}",
                    method="fisher",
                    fishers=partial(self.fishers, estimate),
                    floor=floor,
                    weights=weights,
                )
        return rows

    def aligned(self, suffix: str, **arguments: Any) -> MemberSet:
        """The members after `align`, run once for all of them, with `suffix` after every name."""

        @functools.cache
        def all_aligned() -> list[SequenceEncoder]:
            return align(self.models(), **arguments)

        def member(index: int, name: str) -> SequenceEncoder:
            return self.cache.model(f"{name}{suffix}", lambda: all_aligned()[index])

        members = {
            f"{name}{suffix}": partial(member, index, name)
            for index, name in enumerate(self.members)
        }
        return dataclasses.replace(self, members=members, suffix=f"{self.suffix}{suffix}")

    def aligned_by_loss(
        self, objective: Objective, *, steps: int, batch_size: int, **arguments: Any
    ) -> MemberSet:
        """The members aligned by the loss, a batch of training windows a step."""

        def windows(model: SequenceEncoder) -> list[Tensor]:
            length = model.max_len + objective.lookahead
            return self.cache.data.first_windows(
                steps, batch_size=batch_size, max_len=length, seed=self.cache.seed
            )

        arguments |= {"by": "loss", "objective": objective, "loader": windows, "steps": steps}
        return self.aligned(BY_LOSS, seed=self.cache.seed, **arguments)

    def ensemble(self) -> dict[str, Callable[[], nn.Module]]:
        """The row of the members' averaged scores."""
        return {f"score ensemble{self.suffix}": self._ensemble}

    def over_catalogue(self, model: SequenceEncoder) -> SequenceEncoder:
        return model if self.to_catalogue is None else self.to_catalogue(model)

    def _ensemble(self) -> ScoreEnsemble:
        return ScoreEnsemble([self.over_catalogue(model) for model in self.models()])
