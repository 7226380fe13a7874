"""Members that are to become one model, and the rows of the rules that merge them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from fisherkern.alignment import align
from fisherkern.data import SequenceDataset
from fisherkern.encoders import SequenceEncoder
from fisherkern.evaluation import ScoreEnsemble
from fisherkern.experiments.lab import Lab
from fisherkern.fisher import DiagFisher
from fisherkern.objectives import Objective

Make = Callable[[], SequenceEncoder]

TURNED = ", aligned by the loss"
# Batches of training windows that it learns from.
TURN_STEPS = 600


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Which Fisher: the arguments of `diag_fisher`, and as text the name it is kept under."""

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


@dataclasses.dataclass(frozen=True)
class Family:
    """Members by name, made when a row needs them.

    data: what each member was trained on and its Fisher is taken on; None is all of the lab's.
    sequences: training pairs of every Fisher. suffix: put after the rules' names, for a second
    family in one table. fit: made of every merge, to bring it to the data's catalogue.
    """

    lab: Lab
    members: Mapping[str, Make]
    sequences: int
    data: Mapping[str, SequenceDataset] | None = None
    suffix: str = ""
    fit: Callable[[SequenceEncoder], SequenceEncoder] | None = None

    def models(self) -> list[SequenceEncoder]:
        return [make() for make in self.members.values()]

    def fishers(self, estimate: Estimate) -> list[DiagFisher]:
        return [
            self.lab.fisher(
                f"{name}, {estimate}",
                make,
                sequences=self.sequences,
                data=None if self.data is None else self.data[name],
                **estimate.arguments(),
            )
            for name, make in self.members.items()
        ]

    def merge(
        self,
        name: str,
        *,
        fishers: Callable[[], Sequence[Any]] | None = None,
        base: Make | None = None,
        **how: Any,
    ) -> dict[str, Make]:
        """The row `name` of one merge; the arguments of `merge`, with these two called first."""
        name += self.suffix

        def make() -> SequenceEncoder:
            late: dict[str, Any] = {}
            if fishers is not None:
                late["fishers"] = fishers()
            if base is not None:
                late["base"] = base()
            found = self.lab.merged(name, self.models(), **how, **late)
            return self.fitted(found)

        return {name: make}

    def fisher_merges(
        self,
        estimates: Sequence[Estimate] = (EXACT,),
        floors: Sequence[float] = (0.1, 1.0),
        *,
        title: str = "Fisher merge",
        weights: Sequence[float] | None = None,
    ) -> dict[str, Make]:
        """A row for every estimate and floor; the estimate is named where there are several."""
        rows: dict[str, Make] = {}
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

    def aligned(self, suffix: str, **how: Any) -> Family:
        """The members after `align`, run once for all of them, with `suffix` after every name."""

        @cache
        def found() -> list[SequenceEncoder]:
            return align(self.models(), **how)

        def one(number: int, name: str) -> SequenceEncoder:
            return self.lab.model(f"{name}{suffix}", lambda: found()[number])

        members = {f"{name}{suffix}": partial(one, n, name) for n, name in enumerate(self.members)}
        return dataclasses.replace(self, members=members, suffix=f"{self.suffix}{suffix}")

    def turned(self, objective: Objective, *, steps: int, batch_size: int, **how: Any) -> Family:
        """The members aligned by the loss, a batch of training windows a step."""

        def windows(model: SequenceEncoder) -> list[Tensor]:
            length = model.max_len + objective.lookahead
            return self.lab.data.first_windows(
                steps, batch_size=batch_size, max_len=length, seed=self.lab.seed
            )

        how |= {"by": "loss", "objective": objective, "loader": windows, "steps": steps}
        return self.aligned(TURNED, seed=self.lab.seed, **how)

    def ensemble(self) -> dict[str, Callable[[], nn.Module]]:
        """The row of the members' averaged scores."""
        return {f"score ensemble{self.suffix}": self._ensemble}

    def fitted(self, model: SequenceEncoder) -> SequenceEncoder:
        return model if self.fit is None else self.fit(model)

    def _ensemble(self) -> ScoreEnsemble:
        return ScoreEnsemble([self.fitted(model) for model in self.models()])
