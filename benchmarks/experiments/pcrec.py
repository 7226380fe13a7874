"""Two peers that cooperate, against one network trained alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import BEAUTY, Experiment, RowBuilders
from fisherkern.encoders import SequenceEncoder
from fisherkern.objectives import MaskedItems

ALONE = "one network, as many epochs"
LONGER = "one network, twice as many epochs"


@dataclasses.dataclass(frozen=True)
class Pcrec(Experiment):
    """Train BERT4Rec alone and as two peers that cooperate (PCRec, arXiv 2111.00429).

    All start from scratch and keep the weights of the epoch that is best on validation. A peer
    has half the other's learning rate and another data order. Both peers together see twice as
    many epochs as one network.

    Args:
        mask_ratio: share of masked items.
        peer_epochs: passes of each peer.
        alpha: slope of the mixing weights, as `train_peers` takes it.
        bins: bins of the histogram of the entropy.
        percent: percentile of a tensor's magnitudes below which a peer takes the other's values.
        validations: validations of a training, evenly spread.
    """

    mask_ratio: float = 0.2
    peer_epochs: int = 60
    alpha: float = 30.0
    bins: int = 10
    percent: float = 50.0
    validations: int = 20

    PRESETS: ClassVar = {"beauty": {**BEAUTY, "peer_epochs": 45}}

    def references(self) -> dict[str, Sequence[str]]:
        return {"alone": [ALONE], "twice as long": [LONGER]}

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        masked = MaskedItems(self.mask_ratio)
        settings: dict[str, Any] = {
            "schedule": "linear",
            "seed": cache.seed,
            "validate": cache.score,
            "validate_every": max(1, self.peer_epochs // self.validations),
            **self.training(),
        }

        def alone(name: str, epochs: int) -> SequenceEncoder:
            return cache.train(
                name, partial(self.untrained, cache), masked, epochs=epochs, **settings
            )

        def peers(name: str, cooperation: str, criterion: str = "entropy") -> SequenceEncoder:
            return cache.train_peers(
                name,
                lambda: (self.untrained(cache), self.untrained(cache, offset=1)),
                masked,
                epochs=self.peer_epochs,
                cooperation=cooperation,
                criterion=criterion,
                alpha=self.alpha,
                bins=self.bins,
                percent=self.percent,
                **settings,
            )

        cooperations = {
            "PCRec, layer-wise, entropy": ("layer", "entropy"),
            "PCRec, layer-wise, L1": ("layer", "l1"),
            "PCRec, parameter-wise": ("parameter",),
        }
        return {
            ALONE: partial(alone, ALONE, self.peer_epochs),
            **{name: partial(peers, name, *arguments) for name, arguments in cooperations.items()},
            LONGER: partial(alone, LONGER, 2 * self.peer_epochs),
        }
