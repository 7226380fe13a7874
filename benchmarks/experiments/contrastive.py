"""Members trained with different objectives, and the rows of their merges."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import Experiment, RowBuilders
from benchmarks.experiments.member_set import ALIGN_STEPS, EXACT, Estimate, MemberSet, ModelBuilder
from fisherkern.encoders import SequenceEncoder
from fisherkern.objectives import CL4SRec, DuoRec, MaskedItems, NTXent, Objective

MASKED, CL, UNSUPERVISED, SUPERVISED = MEMBERS = (
    "masked items",
    "+ CL4SRec",
    "+ DuoRec, unsupervised",
    "+ DuoRec, supervised",
)
UNIFORM = "uniform merge"
FISHER = "Fisher merge, exact, floor 0.1"
EXTRA = ", masked items once more"
CONTROL = "masked items, as many passes as all members"
# Seeds: a member's number counts MEMBERS from 1; runs of neighbouring seeds share nothing.
STRIDE, CONTROL_NUMBER, EXTRA_NUMBER = 1000, 8, 9


@dataclasses.dataclass(frozen=True)
class Contrastive(Experiment):
    """Train four members by four objectives, merge them, and train every row equally after it.

    The control has masked items alone, for as many passes as all members together; a contrastive
    pass costs more than one of those. Then every row gets `extra_epochs` more of masked items at
    a tenth of the rate, decayed, with the same windows and masks. Rows with that training are
    compared with one another; the ensemble is then that of the members that have it.

    Args:
        mask_ratio: share of masked items.
        member_epochs: passes of every member over the training users.
        extra_epochs: passes of every row after the merges; 0 for none.
        schedule: "linear", a member's learning rate decays to zero, or "constant".
        contrastive_weight: weight of a contrastive loss.
        temperature: of the contrastive losses.
        similarity: "dot" or "cosine".
        fisher_sequences: training pairs of every Fisher.
        top_k: items of the sampler "topk".
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

    def start(self, cache: ArtifactCache, number: int) -> SequenceEncoder:
        """The model that member `number` starts as."""
        raise NotImplementedError

    def origin(self, cache: ArtifactCache) -> ModelBuilder | None:
        """The one model that all members started as: the base of task vectors; None without one."""
        raise NotImplementedError

    def bases(self, cache: ArtifactCache) -> dict[str, ModelBuilder]:
        """The row of the trained model that all members started as; empty without one."""
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
            UNIFORM: [UNIFORM],
            "as many passes": [CONTROL],
        }

    def suffix(self, row: str) -> str:
        return EXTRA if row.endswith(EXTRA) else ""

    def paper_numbers(self) -> Mapping[str, str]:
        merged = f"Fisher merge, {self.topk()}, floor 0.1{EXTRA * bool(self.extra_epochs)}"
        return {**self.PAPER, merged: self.MERGED}

    def topk(self) -> Estimate:
        return Estimate("topk", self.top_k)

    def trained(
        self,
        cache: ArtifactCache,
        name: str,
        start: ModelBuilder,
        objective: str,
        epochs: int,
        number: int,
        **other: Any,
    ) -> SequenceEncoder:
        """The stored model `name`, trained with the objective of that member."""
        settings = {
            **self.training(),
            "epochs": epochs,
            "schedule": self.schedule,
            "seed": cache.seed + STRIDE * number,
            **other,
        }
        return cache.train(name, start, self.objectives()[objective], **settings)

    def members(self, cache: ArtifactCache) -> dict[str, ModelBuilder]:
        return {
            name: partial(
                self.trained,
                cache,
                name,
                partial(self.start, cache, number),
                name,
                self.member_epochs,
                number,
            )
            for number, name in enumerate(MEMBERS, start=1)
        }

    def member_set(self, cache: ArtifactCache) -> MemberSet:
        return MemberSet(cache, self.members(cache), self.fisher_sequences)

    def merges(self, cache: ArtifactCache) -> dict[str, ModelBuilder]:
        member_set, base = self.member_set(cache), self.origin(cache)
        masked = self.objectives()[MASKED]
        aligned = member_set.aligned_by_loss(masked, steps=ALIGN_STEPS, batch_size=self.batch_size)
        rows = {
            **member_set.merge(UNIFORM, method="uniform"),
            **member_set.fisher_merges((EXACT, self.topk())),
            **member_set.merge(
                f"{FISHER}, searched weights",
                method="fisher",
                fishers=partial(member_set.fishers, EXACT),
                floor=0.1,
                weights="search",
                score=cache.score,
                seed=cache.seed,
            ),
            **member_set.merge("greedy soup", method="greedy_soup", score=cache.score),
            **aligned.merge(UNIFORM, method="uniform"),
        }
        if base is not None:
            rows |= member_set.merge("task arithmetic", method="task_arithmetic", base=base)
            rows |= member_set.merge("TIES", method="ties", base=base)
        return rows

    def extra_trained(
        self, cache: ArtifactCache, rows: Mapping[str, ModelBuilder]
    ) -> dict[str, ModelBuilder]:
        """The rows' models after the extra epochs, the same for all."""
        slower = {"lr": self.lr / 10, "warmup_steps": 0, "schedule": "linear"}
        epochs, number = self.extra_epochs, EXTRA_NUMBER
        if not epochs:
            return {}
        return {
            f"{name}{EXTRA}": partial(
                self.trained, cache, f"{name}{EXTRA}", build, MASKED, epochs, number, **slower
            )
            for name, build in rows.items()
        }

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        members = self.members(cache)
        single = {**self.bases(cache), **members, **self.merges(cache)}
        rows: RowBuilders = {**single, **self.member_set(cache).ensemble()}
        extra = self.extra_trained(cache, single)
        if extra:
            after = {name: extra[f"{name}{EXTRA}"] for name in members}
            rows |= {
                **extra,
                **MemberSet(cache, after, self.fisher_sequences, suffix=EXTRA).ensemble(),
            }
        start = partial(self.start, cache, CONTROL_NUMBER)
        passes = self.member_epochs * len(MEMBERS)
        control: dict[str, ModelBuilder] = {
            CONTROL: partial(self.trained, cache, CONTROL, start, MASKED, passes, CONTROL_NUMBER)
        }
        return {**rows, **control, **self.extra_trained(cache, control)}
