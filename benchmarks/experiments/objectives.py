"""What encoders and objectives reach in a few minutes of one core each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import BEAUTY, Experiment, RowBuilders
from fisherkern.encoders import Caser, GRU4Rec, SASRec, SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives import CL4SRec, DuoRec, MaskedItems, NextItem, NTXent, Objective

BERT, SAS, CL, DUO, GRU, CASER = (
    "BERT4Rec, masked items",
    "SASRec, next item",
    "SASRec, next item + CL4SRec",
    "SASRec, next item + DuoRec",
    "GRU4Rec, next item",
    "Caser, next item",
)


@dataclasses.dataclass(frozen=True)
class Objectives(Experiment):
    """Train encoders from scratch and keep the weights of the epoch that is best on validation.

    The learning rate rises for warmup_steps and then falls to zero over all epochs. `lr` and
    `dropout` are those of BERT4Rec. Caser sees windows of 5 items and the next. The released
    codes' contrastive weight, temperature and similarity, 0.1, 1 and "dot", let the contrastive
    loss dominate the next-item loss, which is a mean over positions.

    Args:
        epochs: of every row, instead of a number for each encoder.
        bert4rec_epochs: of BERT4Rec.
        next_epochs: of SASRec and GRU4Rec.
        caser_epochs: of Caser.
        next_lr: learning rate of all encoders but BERT4Rec.
        next_dropout: dropout of SASRec and GRU4Rec.
        caser_dropout: dropout of Caser's only hidden layer.
        mask_ratio: share of masked items.
        contrastive_weight: weight of a contrastive loss beside the next-item loss.
        temperature: of the contrastive losses.
        similarity: "dot" or "cosine".
        duorec_mode: DuoRec's positives, as `DuoRec` takes it.
        validations: validations of a training, evenly spread.
        patience: validations without a new best that end a training.
    """

    epochs: int | None = None
    bert4rec_epochs: int = 80
    next_epochs: int = 50
    caser_epochs: int = 400
    next_lr: float = 2e-3
    next_dropout: float = 0.2
    caser_dropout: float = 0.5
    mask_ratio: float = 0.2
    contrastive_weight: float = 0.02
    temperature: float = 0.5
    similarity: str = "cosine"
    duorec_mode: str = "us_x"
    validations: int = 20
    patience: int = 5

    PRESETS: ClassVar = {
        "beauty": {
            **BEAUTY,
            "lr": 2e-3,
            "next_dropout": 0.5,
            "bert4rec_epochs": 120,
            "next_epochs": 40,
            "caser_epochs": 60,
        },
    }
    PAPER: ClassVar = {BERT: ".1516, .2821", DUO: ".1680, .2946"}
    NOTE: ClassVar = (
        "The paper column is NDCG@10 and HR@10 of full rankings on ML-1M at other settings."
        " BERT4Rec: what a published replication expects, seen items left out, after far more"
        " steps. DuoRec: its paper, D = 64, T = 50, seen items kept; users of its code report"
        " .1376 and .25 to .26."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base is not None:
            raise InputError("base: every row of objectives starts from scratch")

    def rankings(self) -> Mapping[str, str]:
        return {"NDCG@10, seen items kept": "keep"}

    def references(self) -> dict[str, Sequence[str]]:
        return {"SASRec": [SAS], "BERT4Rec": [BERT]}

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        def bert4rec() -> SequenceEncoder:
            return self.untrained(cache)

        def sasrec() -> SequenceEncoder:
            return cache.fresh(SASRec, **{**self.sizes(), "dropout": self.next_dropout})

        def gru4rec() -> SequenceEncoder:
            dropout = self.next_dropout
            return cache.fresh(GRU4Rec, max_len=self.max_len, dim=self.dim, dropout=dropout)

        def caser() -> SequenceEncoder:
            return cache.fresh(Caser, max_len=5, dim=self.dim, dropout=self.caser_dropout)

        def trained(
            name: str, start: Callable[[], SequenceEncoder], objective: Objective, epochs: int
        ) -> SequenceEncoder:
            epochs = epochs if self.epochs is None else self.epochs
            settings: dict[str, Any] = {**self.training(), "epochs": epochs}
            if name != BERT:
                settings["lr"] = self.next_lr
            return cache.train(
                name,
                start,
                objective,
                schedule="linear",
                seed=cache.seed,
                validate=cache.score,
                validate_every=max(1, epochs // self.validations),
                patience=self.patience,
                **settings,
            )

        following, weight = NextItem(), self.contrastive_weight
        loss = NTXent(self.temperature, self.similarity)
        contrastive = {CL: CL4SRec(loss=loss), DUO: DuoRec(self.duorec_mode, loss=loss)}
        trainings: dict[str, tuple[Callable[[], SequenceEncoder], Objective, int]] = {
            BERT: (
                lambda: self.untrained(cache),
                MaskedItems(self.mask_ratio),
                self.bert4rec_epochs,
            ),
            SAS: (sasrec, following, self.next_epochs),
            **{
                name: (sasrec, following + weight * part, self.next_epochs)
                for name, part in contrastive.items()
            },
            GRU: (gru4rec, following, self.next_epochs),
            CASER: (caser, NextItem(last_only=True), self.caser_epochs),
        }
        return {name: partial(trained, name, *arguments) for name, arguments in trainings.items()}
