"""Two peers that cooperate, against one network trained alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import BEAUTY, Experiment, RowBuilders
from fisherkern.encoders import ENCODERS as ENCODER_CLASSES
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives import MaskedItems, NextItem, Objective

ENCODERS = ("BERT4Rec", "FISM", "YouTubeDNN")
ALONE = "one network, as many epochs"
LONGER = "one network, twice as many epochs"


@dataclasses.dataclass(frozen=True)
class Pcrec(Experiment):
    """Train one network alone and two peers that cooperate (PCRec, arXiv 2111.00429).

    All start from scratch and keep the weights of the epoch that is best on validation. A peer
    has half the other's learning rate and another data order. Both peers together see twice as
    many epochs as one network.

    Two of the paper's bases are here: its BPR is FISM with BPR's loss, as a sequence has no user.

    Args:
        encoder: "BERT4Rec" with masked items, "FISM" with BPR's loss and one negative, or
            "YouTubeDNN" with the softmax over all next items.
        mask_ratio: share of masked items.
        peer_epochs: passes of each peer.
        alpha: slope of the mixing weights, as `train_peers` takes it.
        bins: bins of the histogram of the entropy.
        percent: percentile of a tensor's magnitudes below which a peer takes the other's values.
        validations: validations of a training, evenly spread.
    """

    encoder: str = "BERT4Rec"
    mask_ratio: float = 0.2
    peer_epochs: int = 60
    alpha: float = 30.0
    bins: int = 10
    percent: float = 50.0
    validations: int = 20

    PRESETS: ClassVar = {"beauty": {**BEAUTY, "peer_epochs": 45}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ENCODERS:
            raise InputError(f"encoder: {self.encoder!r} is not one of {', '.join(ENCODERS)}")

    def untrained(self, cache: ArtifactCache, *, offset: int = 0) -> SequenceEncoder:
        if self.encoder == "BERT4Rec":
            return super().untrained(cache, offset=offset)
        sizes = {"max_len": self.max_len, "dim": self.dim, "dropout": self.dropout}
        if self.encoder == "YouTubeDNN":
            sizes["layers"] = self.layers
        kind: type[SequenceEncoder] = ENCODER_CLASSES[self.encoder]
        return cache.fresh(kind, offset=offset, **sizes)

    def objective(self) -> Objective:
        """What the encoder is trained by."""
        if self.encoder == "BERT4Rec":
            return MaskedItems(self.mask_ratio)
        bpr = self.encoder == "FISM"
        return NextItem("bpr", 1, negatives_per="position") if bpr else NextItem()

    def references(self) -> dict[str, Sequence[str]]:
        return {"alone": [ALONE], "twice as long": [LONGER]}

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        objective = self.objective()
        settings: dict[str, Any] = {
            "schedule": "linear",
            "seed": cache.seed,
            "validate": cache.score,
            "validate_every": max(1, self.peer_epochs // self.validations),
            **self.training(),
        }

        def alone(name: str, epochs: int) -> SequenceEncoder:
            return cache.train(
                name, partial(self.untrained, cache), objective, epochs=epochs, **settings
            )

        def peers(name: str, cooperation: str, criterion: str = "entropy") -> SequenceEncoder:
            return cache.train_peers(
                name,
                lambda: (self.untrained(cache), self.untrained(cache, offset=1)),
                objective,
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
