"""Members far apart, from scratch or by long branches, merged with and without alignment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

from torch import nn

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import BEAUTY, Experiment, RowBuilders
from benchmarks.experiments.member_set import ALIGN_STEPS, BY_LOSS, MemberSet
from fisherkern import repair
from fisherkern.encoders import SASRec, SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives import MaskedItems, NextItem, Objective

Members = Mapping[str, Callable[[], SequenceEncoder]]

ENCODERS = ("BERT4Rec", "SASRec")
ALIGNED, PERMUTED = ", aligned", ", aligned by permutations"


@dataclasses.dataclass(frozen=True)
class Branches(Experiment):
    """Train members that differ in their seeds, and merge them as they are and aligned.

    A BERT4Rec's symmetries outside the heads are permutations. The SASRec here is pre-norm with
    an output layer that is not tied, so that `align` may rotate its residual stream; then both
    alignments are in the table.

    Args:
        encoder: "BERT4Rec" with masked items, or "SASRec" with the next item.
        count: number of members.
        mask_ratio: share of masked items.
        base_epochs: passes of a common base; 0 trains every member from scratch.
        shared_start: one initialisation for members from scratch.
        member_epochs: passes of each member after the base.
        schedule: "linear", a member's learning rate decays to zero, or "constant".
        fisher_sequences: training pairs of every Fisher.
        turn_steps: batches of training windows that the alignment by the loss learns from.
    """

    encoder: str = "BERT4Rec"
    count: int = 3
    mask_ratio: float = 0.2
    base_epochs: int = 0
    shared_start: bool = False
    member_epochs: int = 80
    schedule: str = "linear"
    fisher_sequences: int = 2000
    turn_steps: int = ALIGN_STEPS

    PRESETS: ClassVar = {"beauty": {**BEAUTY, "member_epochs": 45}}
    ENSEMBLE: ClassVar = "score ensemble"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ENCODERS:
            raise InputError(f"encoder: {self.encoder!r} is not one of {', '.join(ENCODERS)}")
        if self.count < 2:
            raise InputError(f"count: must be at least 2, got {self.count}")
        if self.base is not None and self.base_epochs:
            raise InputError("base: a model to start from needs no base_epochs")
        if self.shared_start and (self.base is not None or self.base_epochs):
            raise InputError("shared_start: members that branch share a trained start")

    def names(self) -> list[str]:
        return [f"member {number + 1}" for number in range(self.count)]

    def references(self) -> dict[str, Sequence[str]]:
        return {"best member": self.names(), "uniform merge": ["uniform merge"]}

    def untrained(self, cache: ArtifactCache, *, offset: int = 0) -> SequenceEncoder:
        if self.encoder == "BERT4Rec":
            return super().untrained(cache, offset=offset)
        return cache.fresh(SASRec, offset=offset, tied=False, bias=True, **self.sizes())

    def start(self, cache: ArtifactCache, number: int) -> SequenceEncoder:
        """What member `number` starts as where there is no base."""
        # Runs of neighbouring seeds share no member.
        return self.untrained(cache, offset=0 if self.shared_start else 1000 * number)

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        rotates = self.encoder == "SASRec"
        objective: Objective = NextItem() if rotates else MaskedItems(self.mask_ratio)
        base = partial(self.common_base, cache, objective, self.base_epochs)
        branching = self.base_epochs > 0 or cache.given_base is not None

        def member(number: int, name: str) -> SequenceEncoder:
            return cache.train(
                name,
                base if branching else partial(self.start, cache, number),
                objective,
                epochs=self.member_epochs,
                seed=cache.seed + 1000 * number,
                schedule=self.schedule,
                **self.training(),
            )

        numbered = enumerate(self.names(), start=1)
        members: Members = {name: partial(member, n, name) for n, name in numbered}
        plain = MemberSet(cache, members, self.fisher_sequences)
        member_sets = {"": plain, ALIGNED: plain.aligned(ALIGNED, rotate=rotates)}
        if rotates:
            member_sets[PERMUTED] = plain.aligned(PERMUTED, rotate=False)
        settings = {"steps": self.turn_steps, "batch_size": self.batch_size, "rotate": rotates}
        member_sets[BY_LOSS] = plain.aligned_by_loss(objective, **settings)

        def recalibrated(suffix: str) -> SequenceEncoder:
            member_set, name = member_sets[suffix], f"uniform merge{suffix}"
            merged = member_set.merge(name.removesuffix(suffix), method="uniform")[name]
            loader = cache.data.loader(
                split="train", max_len=merged().max_len, limit=min(1000, cache.data.num_users)
            )
            return cache.model(
                f"{name}, recalibrated", lambda: repair(merged(), member_set.models(), loader)
            )

        rows: dict[str, Callable[[], nn.Module]] = {"base": base} if branching else {}
        rows |= members
        for member_set in member_sets.values():
            rows |= member_set.merge("uniform merge", method="uniform")
            rows |= member_set.fisher_merges()
        for suffix in (ALIGNED, BY_LOSS):
            rows[f"uniform merge{suffix}, recalibrated"] = partial(recalibrated, suffix)
        return {**rows, **member_sets[""].ensemble()}
