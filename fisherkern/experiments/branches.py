"""Members far apart, from scratch or by long branches: what alignment gives back to the rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

from torch import nn

from fisherkern.encoders import SASRec, SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.experiments.experiment import BEAUTY, Experiment, Rows
from fisherkern.experiments.family import TURN_STEPS, TURNED, Family
from fisherkern.experiments.lab import Lab
from fisherkern.objectives import MaskedItems, NextItem, Objective
from fisherkern.postmerge import repair

Members = Mapping[str, Callable[[], SequenceEncoder]]

ENCODERS = ("BERT4Rec", "SASRec")
ALIGNED, PERMUTED = ", aligned", ", aligned by permutations"


@dataclasses.dataclass(frozen=True)
class Branches(Experiment):
    """Members that differ in their seeds, and every rule on them as they are and aligned.

    base_epochs: passes of the base they branch from; 0 gives every member an initialisation of its
    own, or all one with shared_start. member_epochs: of each member after that; meanwhile
    its learning rate decays to zero, or stays (schedule "constant"). encoder: "BERT4Rec" with
    masked items, whose symmetries outside the heads are permutations, or "SASRec" with the next
    item, pre-norm and an output layer of its own, whose residual stream `align` may rotate: then
    both alignments are in the table. turn_steps: batches of training windows that `align` by the
    loss learns from.
    """

    encoder: str = "BERT4Rec"
    count: int = 3
    mask_ratio: float = 0.2
    base_epochs: int = 0
    shared_start: bool = False
    member_epochs: int = 80
    schedule: str = "linear"
    fisher_sequences: int = 2000
    turn_steps: int = TURN_STEPS

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

    def untrained(self, lab: Lab, *, offset: int = 0) -> SequenceEncoder:
        if self.encoder == "BERT4Rec":
            return super().untrained(lab, offset=offset)
        return lab.fresh(SASRec, offset=offset, tied=False, bias=True, **self.sizes())

    def start(self, lab: Lab, number: int) -> SequenceEncoder:
        """What member `number` starts as where there is no base."""
        # Runs of neighbouring seeds share no member.
        return self.untrained(lab, offset=0 if self.shared_start else 1000 * number)

    def rows(self, lab: Lab) -> Rows:
        rotates = self.encoder == "SASRec"
        objective: Objective = NextItem() if rotates else MaskedItems(self.mask_ratio)
        base = partial(self.common_base, lab, objective, self.base_epochs)
        branching = self.base_epochs > 0 or lab.given_base is not None

        def member(number: int, name: str) -> SequenceEncoder:
            return lab.train(
                name,
                base if branching else partial(self.start, lab, number),
                objective,
                epochs=self.member_epochs,
                seed=lab.seed + 1000 * number,
                schedule=self.schedule,
                **self.training(),
            )

        numbered = enumerate(self.names(), start=1)
        members: Members = {name: partial(member, n, name) for n, name in numbered}
        plain = Family(lab, members, self.fisher_sequences)
        family_of = {"": plain, ALIGNED: plain.aligned(ALIGNED, rotate=rotates)}
        if rotates:
            family_of[PERMUTED] = plain.aligned(PERMUTED, rotate=False)
        how = {"steps": self.turn_steps, "batch_size": self.batch_size, "rotate": rotates}
        family_of[TURNED] = plain.turned(objective, **how)

        def recalibrated(suffix: str) -> SequenceEncoder:
            family, name = family_of[suffix], f"uniform merge{suffix}"
            merged = family.merge(name.removesuffix(suffix), method="uniform")[name]
            loader = lab.data.loader(
                split="train", max_len=merged().max_len, limit=min(1000, lab.data.num_users)
            )
            return lab.model(
                f"{name}, recalibrated", lambda: repair(merged(), family.models(), loader)
            )

        rows: dict[str, Callable[[], nn.Module]] = {"base": base} if branching else {}
        rows |= members
        for family in family_of.values():
            rows |= family.merge("uniform merge", method="uniform")
            rows |= family.fisher_merges()
        for suffix in (ALIGNED, TURNED):
            rows[f"uniform merge{suffix}, recalibrated"] = partial(recalibrated, suffix)
        return {**rows, **family_of[""].ensemble()}
