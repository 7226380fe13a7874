"""The last checkpoints of runs at a constant rate, merged: of one run, or of several branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import Experiment, RowBuilders
from benchmarks.experiments.member_set import MemberSet
from fisherkern import KeptCheckpoints
from fisherkern.encoders import SASRec, SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives import NextItem
from fisherkern.training import load_model

CONSTANT, DECAYED = "constant rate", "decayed rate"
WEIGHTS = ("linear-decay", "cosine-decay", "1-sqrt-decay")
ENDS, ALL = "last checkpoints of the branches merged", "all checkpoints merged"


@dataclasses.dataclass(frozen=True)
class Checkpoints(Experiment):
    """Merge the last checkpoints of a SASRec's runs, beside a run whose rate decays.

    All runs together have as many windows as that one. The weights of a merge reproduce a decay
    (WSM, arXiv 2507.17634); a linear one is the plain average.

    Args:
        epochs: passes of each run at a constant rate, after the base.
        count: number of checkpoints of a run.
        every: passes from one checkpoint to the next.
        branches: number of runs, of seeds of their own.
        base_epochs: passes of the base that several branches go on from.
    """

    epochs: int = 50
    count: int = 5
    every: int = 2
    branches: int = 1
    base_epochs: int = 0

    PRESETS: ClassVar = {
        "ml-1m": {"dropout": 0.2, "lr": 1e-3},
        "beauty": {"dropout": 0.5, "batch_size": 128, "lr": 1e-3},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 2:
            raise InputError(f"count: must be at least 2, got {self.count}")
        if (self.count - 1) * self.every >= self.epochs:
            raise InputError("count: the run has not so many checkpoints")
        if (self.branches > 1) != (self.base_epochs > 0 or self.base is not None):
            raise InputError(
                "branches: several go on from a base (base_epochs or base), one does not"
            )

    def names(self) -> list[str]:
        """The rows of the runs at a constant rate."""
        numbers = range(1, self.branches + 1)
        return [CONSTANT] if self.branches == 1 else [f"branch {number}" for number in numbers]

    def title(self, weights: str) -> str:
        return f"checkpoints merged, {weights}"

    def references(self) -> dict[str, Sequence[str]]:
        if self.branches == 1:
            return {"last checkpoint": [CONSTANT], "decayed run": [DECAYED]}
        one = [self.title(name) for name in self.names()]
        return {"best branch": self.names(), "best branch merged": one, "decayed run": [DECAYED]}

    def untrained(self, cache: ArtifactCache, *, offset: int = 0) -> SequenceEncoder:
        return cache.fresh(SASRec, offset=offset, **self.sizes())

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        runs = {name: partial(self.run, cache, name) for name in self.names()}
        decayed = partial(self.decayed, cache)
        if self.branches == 1:
            titles = {self.title(weights): weights for weights in WEIGHTS}
            merged = partial(self.merged, cache, names=self.names())
            merges = {title: partial(merged, title, weights=w) for title, w in titles.items()}
            return {**runs, **merges, DECAYED: decayed}
        ends = MemberSet(cache, runs, sequences=1)
        return {
            "base": partial(self.common_base, cache, NextItem(), self.base_epochs),
            **runs,
            **{
                self.title(name): partial(self.merged, cache, self.title(name), [name])
                for name in self.names()
            },
            **ends.merge(ENDS, method="uniform"),
            ALL: partial(self.merged, cache, ALL, self.names()),
            **ends.ensemble(),
            DECAYED: decayed,
        }

    def number(self, name: str) -> int:
        """The number of a run, 0 of one without a base."""
        return self.names().index(name) + int(self.branches > 1)

    def kept(self, cache: ArtifactCache, name: str) -> KeptCheckpoints:
        number = self.number(name)
        folder = f"checkpoints-{number}" if number else "checkpoints"
        return KeptCheckpoints(cache.path(folder, ""), last=self.count, every=self.every)

    def run(self, cache: ArtifactCache, name: str) -> SequenceEncoder:
        """A run at a constant rate, which keeps its last checkpoints."""
        number = self.number(name)
        base = partial(self.common_base, cache, NextItem(), self.base_epochs)
        return cache.train(
            name,
            base if number else partial(self.untrained, cache),
            NextItem(),
            epochs=self.epochs,
            seed=cache.seed + 1000 * number,
            on_epoch=self.kept(cache, name),
            **self.training(),
        )

    def decayed(self, cache: ArtifactCache) -> SequenceEncoder:
        """One run of all passes; a base that was given has passes that nobody counted."""
        return cache.train(
            DECAYED,
            partial(self.untrained, cache),
            NextItem(),
            epochs=self.base_epochs + self.branches * self.epochs,
            seed=cache.seed,
            schedule="linear",
            **self.training(),
        )

    def merged(
        self, cache: ArtifactCache, title: str, names: Sequence[str], weights: str | None = None
    ) -> SequenceEncoder:
        """The kept checkpoints of some runs, merged."""
        last = self.epochs - self.epochs % self.every
        epochs = range(last - (self.count - 1) * self.every, last + 1, self.every)
        members = []
        for name in names:
            self.run(cache, name)
            kept = self.kept(cache, name)
            members += [load_model(kept.path(epoch)) for epoch in epochs]
        return cache.merged(title, members, weights=weights)
