"""Merging without a second member: the last checkpoints of one run at a constant rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import Experiment, RowBuilders
from fisherkern import KeptCheckpoints
from fisherkern.encoders import SASRec, SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives import NextItem
from fisherkern.training import load_model

CONSTANT, DECAYED = "constant rate", "decayed rate"
WEIGHTS = ("linear-decay", "cosine-decay", "1-sqrt-decay")


@dataclasses.dataclass(frozen=True)
class Checkpoints(Experiment):
    """Merge the last checkpoints of a SASRec's run, beside the run whose rate decays.

    Both runs have the same windows for as many epochs. The weights of a merge reproduce a decay
    (WSM, arXiv 2507.17634); a linear one is the plain average.

    Args:
        epochs: passes of each run.
        count: number of checkpoints.
        every: passes from one checkpoint to the next.
    """

    epochs: int = 50
    count: int = 5
    every: int = 2

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

    def title(self, weights: str) -> str:
        return f"checkpoints merged, {weights}"

    def references(self) -> dict[str, Sequence[str]]:
        return {"last checkpoint": [CONSTANT], "decayed run": [DECAYED]}

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        kept = KeptCheckpoints(cache.path("checkpoints", ""), last=self.count, every=self.every)
        last = self.epochs - self.epochs % self.every
        epochs = range(last - (self.count - 1) * self.every, last + 1, self.every)

        def run(name: str, **settings: Any) -> SequenceEncoder:
            start = partial(cache.fresh, SASRec, **self.sizes())
            arguments = {"epochs": self.epochs, "seed": cache.seed, **self.training(), **settings}
            return cache.train(name, start, NextItem(), **arguments)

        def merged(weights: str) -> SequenceEncoder:
            constant()
            members = [load_model(kept.path(epoch)) for epoch in epochs]
            return cache.merged(self.title(weights), members, weights=weights)

        constant = partial(run, CONSTANT, on_epoch=kept)
        return {
            CONSTANT: constant,
            **{self.title(weights): partial(merged, weights) for weights in WEIGHTS},
            DECAYED: partial(run, DECAYED, schedule="linear"),
        }
