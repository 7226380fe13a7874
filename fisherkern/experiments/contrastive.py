"""Members trained with other objectives, and the rows of what is made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from fisherkern.encoders import SequenceEncoder
from fisherkern.experiments.experiment import Experiment, Rows
from fisherkern.experiments.family import EXACT, TURN_STEPS, Estimate, Family, Make
from fisherkern.experiments.lab import Lab
from fisherkern.objectives import CL4SRec, DuoRec, MaskedItems, NTXent, Objective

MASKED, CL, UNSUPERVISED, SUPERVISED = MEMBERS = (
    "masked items",
    "+ CL4SRec",
    "+ DuoRec, unsupervised",
    "+ DuoRec, supervised",
)
FISHER = "Fisher merge, exact, floor 0.1"
EXTRA = ", masked items once more"
CONTROL = "masked items, as many passes as all members"
# Seeds: a member's number is its place among MEMBERS; runs of neighbouring seeds share nothing.
STRIDE, CONTROL_NUMBER, EXTRA_NUMBER = 1000, 8, 9


@dataclasses.dataclass(frozen=True)
class Contrastive(Experiment):
    """Four members by four objectives, the rules that make them one, and equal training after it.

    Every member sees the training users `member_epochs` times. schedule: "linear", the learning
    rate decays to zero meanwhile, or "constant", it stays, as in the released codes. The control
    has masked items alone for as many passes as all members together; a contrastive pass costs
    more than one of those. Then every row, base, members, merges and control alike, gets
    `extra_epochs` more of masked items at a tenth of the rate, decayed, with the same windows and
    masks, and rows with that training are compared with one another; the ensemble is then that of
    the members that have it. contrastive_weight, temperature and similarity are those of the
    contrastive parts. fisher_sequences: training pairs that every Fisher is of. top_k: K of the
    sampler "topk".
    """

    mask_ratio: float = 0.2
    member_epochs: int = 30
    extra_epochs: int = 1
    schedule: str = "linear"
    contrastive_weight: float = 0.1
    temperature: float = 1.0
    similarity: str = "dot"
    fisher_sequences: int = 2000
    top_k: int = 30

    ENSEMBLE: ClassVar[str | None] = "score ensemble"
    #: NDCG@10 of the paper's merge, which stands beside ours by the paper's sampler.
    MERGED: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objectives()

    def start(self, lab: Lab, number: int) -> SequenceEncoder:
        """What member `number` starts as."""
        raise NotImplementedError

    def origin(self, lab: Lab) -> Make | None:
        """What all members started as, where that is one model: the base of task vectors."""
        raise NotImplementedError

    def bases(self, lab: Lab) -> dict[str, Make]:
        """The row of the trained model that all members started as, where there is one."""
        return {}

    def objectives(self) -> dict[str, Objective]:
        """Each member's."""
        masked, loss = MaskedItems(self.mask_ratio), NTXent(self.temperature, self.similarity)
        weight = self.contrastive_weight
        return {
            MASKED: masked,
            CL: masked + weight * CL4SRec(loss=loss),
            UNSUPERVISED: masked + weight * DuoRec("unsupervised", loss=loss),
            SUPERVISED: masked + weight * DuoRec("supervised", loss=loss),
        }

    def references(self) -> dict[str, Sequence[str]]:
        return {
            "best member": MEMBERS,
            "uniform merge": ["uniform merge"],
            "as many passes": [CONTROL],
        }

    def suffix(self, row: str) -> str:
        return EXTRA if row.endswith(EXTRA) else ""

    def figures(self) -> Mapping[str, str]:
        merged = f"Fisher merge, {self.topk()}, floor 0.1{EXTRA * bool(self.extra_epochs)}"
        return {**self.PAPER, merged: self.MERGED}

    def topk(self) -> Estimate:
        return Estimate("topk", self.top_k)

    def trained(
        self, lab: Lab, name: str, start: Make, objective: str, epochs: int, number: int, **how: Any
    ) -> SequenceEncoder:
        """The stored model `name`, trained with the objective of that member."""
        settings = {
            **self.training(),
            "epochs": epochs,
            "schedule": self.schedule,
            "seed": lab.seed + STRIDE * number,
            **how,
        }
        return lab.train(name, start, self.objectives()[objective], **settings)

    def members(self, lab: Lab) -> dict[str, Make]:
        return {
            name: partial(
                self.trained,
                lab,
                name,
                partial(self.start, lab, number),
                name,
                self.member_epochs,
                number,
            )
            for number, name in enumerate(MEMBERS, start=1)
        }

    def family(self, lab: Lab) -> Family:
        return Family(lab, self.members(lab), self.fisher_sequences)

    def merges(self, lab: Lab) -> dict[str, Make]:
        family, base = self.family(lab), self.origin(lab)
        masked = self.objectives()[MASKED]
        turned = family.turned(masked, steps=TURN_STEPS, batch_size=self.batch_size)
        rows = {
            **family.merge("uniform merge", method="uniform"),
            **family.fisher_merges((EXACT, self.topk())),
            **family.merge(
                f"{FISHER}, searched weights",
                method="fisher",
                fishers=partial(family.fishers, EXACT),
                floor=0.1,
                weights="search",
                score=lab.score,
                seed=lab.seed,
            ),
            **family.merge("greedy soup", method="greedy_soup", score=lab.score),
            **turned.merge("uniform merge", method="uniform"),
        }
        if base is not None:
            rows |= family.merge("task arithmetic", method="task_arithmetic", base=base)
            rows |= family.merge("TIES", method="ties", base=base)
        return rows

    def once_more(self, lab: Lab, rows: Mapping[str, Make]) -> dict[str, Make]:
        """The rows' models after the extra epochs, the same for all."""
        slower = {"lr": self.lr / 10, "warmup_steps": 0, "schedule": "linear"}
        epochs, number = self.extra_epochs, EXTRA_NUMBER
        if not epochs:
            return {}
        return {
            f"{name}{EXTRA}": partial(
                self.trained, lab, f"{name}{EXTRA}", make, MASKED, epochs, number, **slower
            )
            for name, make in rows.items()
        }

    def rows(self, lab: Lab) -> Rows:
        members = self.members(lab)
        single = {**self.bases(lab), **members, **self.merges(lab)}
        rows: Rows = {**single, **self.family(lab).ensemble()}
        extra = self.once_more(lab, single)
        if extra:
            after = {name: extra[f"{name}{EXTRA}"] for name in members}
            rows |= {**extra, **Family(lab, after, self.fisher_sequences, suffix=EXTRA).ensemble()}
        start = partial(self.start, lab, CONTROL_NUMBER)
        passes = self.member_epochs * len(MEMBERS)
        control: dict[str, Make] = {
            CONTROL: partial(self.trained, lab, CONTROL, start, MASKED, passes, CONTROL_NUMBER)
        }
        return {**rows, **control, **self.once_more(lab, control)}
