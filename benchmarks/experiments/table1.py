"""Contrastive models trained from scratch, merged: Table 1 of the Fisher paper."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.contrastive import CL, STRIDE, SUPERVISED, Contrastive
from benchmarks.experiments.experiment import BEAUTY
from benchmarks.experiments.member_set import ModelBuilder
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError


@dataclasses.dataclass(frozen=True)
class Table1(Contrastive):
    """Train a BERT4Rec from scratch with each of four objectives (arXiv 2307.05476), and merge.

    Args:
        shared_start: give all members and the control one initialisation; then there are rows of
            task vectors too.
    """

    member_epochs: int = 90
    shared_start: bool = False

    PRESETS: ClassVar = {"beauty": {**BEAUTY, "member_epochs": 55}}
    PAPER: ClassVar = {CL: ".0585", SUPERVISED: ".0933"}
    MERGED: ClassVar = ".1289"
    NOTE: ClassVar = (
        "The paper column is NDCG@10 of its Table 1's full ranking on ML-1M, whose settings"
        " (epochs, length, mask rate, temperature, weight, handling of seen items, whether members"
        " share an initialisation) are not known to us. Its merge, .1289, is held against .1398"
        " of a baseline of its own; it stands beside the merge by the paper's sampler with the"
        " extra training that the paper says its merges had. In DuoRec's released code the"
        " augmentations of CL4SRec change the training sequences in place; if the paper's row comes"
        " from there, that may be why it is so low."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base is not None:
            raise InputError("base: every member of table1 starts from scratch")

    def start(self, cache: ArtifactCache, number: int) -> SequenceEncoder:
        return self.untrained(cache, offset=0 if self.shared_start else STRIDE * number)

    def origin(self, cache: ArtifactCache) -> ModelBuilder | None:
        def untrained() -> SequenceEncoder:
            model = self.start(cache, 0)
            model.item_ids = list(cache.data.item_ids)  # as training gives the members
            return model

        return untrained if self.shared_start else None
