"""What makes a single SASRec good: one setting changed at a time, chosen on validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import Experiment, RowBuilders
from fisherkern.encoders import SASRec, SequenceEncoder
from fisherkern.objectives import NextItem

REFERENCE = "reference"
# A row -> what it has in place of the reference's settings.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    REFERENCE: {},
    "D = 64": {"dim": 64},
    "D = 128": {"dim": 128},
    "D = 256": {"dim": 256},
    "T = 20": {"max_len": 20},
    "T = 50": {"max_len": 50},
    "T = 128": {"max_len": 128},
    "dropout .2": {"dropout": 0.2},
    "dropout .3": {"dropout": 0.3},
    "dropout .4": {"dropout": 0.4},
    "dropout .5": {"dropout": 0.5},
    "dropout .6": {"dropout": 0.6},
    "1 layer": {"layers": 1},
    "3 layers": {"layers": 3},
    "batches of 32": {"batch_size": 32},
    "batches of 256": {"batch_size": 256},
    "a third of the passes": {"epochs": 1 / 3},
    "twice the passes": {"epochs": 2},
    "windows of the last items": {"crop": "last"},
    "sampled softmax": {"objective": NextItem("sampled_softmax")},
    "gBCE": {"objective": NextItem("gbce")},
}


@dataclasses.dataclass(frozen=True)
class Ablation(Experiment):
    """Train single SASRecs that differ in one setting from a reference.

    The learning rate decays linearly, and the weights of the epoch that is best on validation are
    kept. A row whose setting is the reference's is left out.

    Args:
        epochs: passes of the reference.
        validations: validations of a training, evenly spread.
    """

    epochs: int = 150
    validations: int = 10

    PRESETS: ClassVar = {
        "ml-1m": {"max_len": 200, "dim": 256, "dropout": 0.3, "batch_size": 128, "lr": 1e-3},
        "beauty": {
            "max_len": 50,
            "dim": 256,
            "dropout": 0.5,
            "batch_size": 128,
            "lr": 1e-3,
            "epochs": 60,
        },
    }

    def references(self) -> dict[str, Sequence[str]]:
        return {REFERENCE: [REFERENCE]}

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        changes = {
            name: change
            for name, change in CHANGES.items()
            if not change or any(getattr(self, key, None) != v for key, v in change.items())
        }
        return {name: partial(self.single, cache, name, **c) for name, c in changes.items()}

    def single(self, cache: ArtifactCache, name: str, **changes: Any) -> SequenceEncoder:
        """A network with these settings in place of the reference's."""
        own = {**self.sizes(), **self.training(), **changes}
        sizes = {key: own.pop(key) for key in self.sizes()}
        epochs = max(1, round(self.epochs * own.pop("epochs", 1)))
        return cache.train(
            name,
            partial(cache.fresh, SASRec, **sizes),
            own.pop("objective", NextItem()),
            epochs=epochs,
            seed=cache.seed,
            schedule="linear",
            validate=cache.score,
            validate_every=max(1, epochs // self.validations),
            **own,
        )
