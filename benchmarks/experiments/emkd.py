"""Networks that teach each other, their ensemble, and the ensemble made one network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import BEAUTY, Experiment, RowBuilders
from benchmarks.experiments.member_set import MemberSet
from fisherkern.encoders import BERT4Rec, ParallelEncoders, SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives import EMKD, MaskedItems

ENSEMBLE = "EMKD, averaged logits"
APART = "same networks without contrast and distillation, averaged logits"
CONTROL = "masked items, as many masked sequences as all networks"
# Data -> the paper's NDCG@10, and the number of last positions whose items its code does not rank.
PUBLISHED = {"ml-1m": (".1915", 39), "beauty": (".0594", 14)}


@dataclasses.dataclass(frozen=True)
class Emkd(Experiment):
    """Train BERT4Rec networks by EMKD (SIGIR 2023), as an ensemble and merged into one.

    Each epoch shows `views` maskings of every window to every network; the control sees as many.

    Args:
        start: "base", the networks are branches of one base, so that they can be merged, or
            "seeds", each is drawn from a seed of its own, as in the paper.
        networks: number of networks.
        views: maskings of a window in an epoch.
        noise: distance of a branch from the base, a share of each tensor's root mean square.
        mask_ratio: share of masked items.
        temperature: of the contrastive and distillation losses.
        contrast_weight: weight of the contrastive loss.
        distill_weight: weight of the distillation loss.
        attribute_weight: weight of the attribute loss, which the control lacks; 0 for none.
        base_epochs: passes of the base.
        member_epochs: passes of the networks together.
        fisher_sequences: training pairs of every Fisher.
    """

    start: str = "base"
    networks: int = 3
    views: int = 2
    noise: float = 0.05
    mask_ratio: float = 0.2
    temperature: float = 1.0
    contrast_weight: float = 0.01
    distill_weight: float = 0.1
    attribute_weight: float = 0.0
    base_epochs: int = 60
    member_epochs: int = 10
    fisher_sequences: int = 2000

    PRESETS: ClassVar = {"beauty": {**BEAUTY, "base_epochs": 40, "member_epochs": 8}}
    ENSEMBLE: ClassVar = ENSEMBLE
    NOTE: ClassVar = (
        "The paper column is NDCG@10 with D = 256 and attributes. Its code ranks all items but"
        " those of the last places, one fewer than its input has, as the column beside it does."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("base", "seeds"):
            raise InputError(f"start: must be 'base' or 'seeds', got {self.start!r}")
        if self.start == "seeds" and self.base is not None:
            raise InputError("base: networks with start 'seeds' have none")

    def published(self) -> tuple[str, int] | None:
        return PUBLISHED.get(Path(self.data).stem)

    def rankings(self) -> Mapping[str, str]:
        published = self.published()
        if published is None:
            return {}
        return {"NDCG@10 by the paper's ranking": f"last-{published[1]}"}

    def paper(self) -> tuple[Mapping[str, str], str]:
        published = self.published()
        return ({}, "") if published is None else ({ENSEMBLE: published[0]}, self.NOTE)

    def names(self) -> list[str]:
        return [f"network {number + 1}" for number in range(self.networks)]

    def references(self) -> dict[str, Sequence[str]]:
        return {"best network": self.names(), "EMKD": [ENSEMBLE], "as many": [CONTROL]}

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        masked = MaskedItems(self.mask_ratio)
        base = partial(self.common_base, cache, masked, self.base_epochs)
        together = EMKD(
            views=self.views,
            ratio=self.mask_ratio,
            temperature=self.temperature,
            contrast_weight=self.contrast_weight,
            distill_weight=self.distill_weight,
            attribute_weight=self.attribute_weight,
            networks=self.networks,
            dim=self.dim,
            seed=cache.seed,
        )
        alone = dataclasses.replace(together, contrast_weight=0, distill_weight=0)
        settings: dict[str, Any] = {"schedule": "linear", "seed": cache.seed + 1, **self.training()}

        def drawn() -> SequenceEncoder:
            return BERT4Rec(cache.data.num_items, **self.sizes())

        def start() -> ParallelEncoders:
            if self.start == "base":
                return ParallelEncoders.copies(base(), self.networks, self.noise, cache.seed)
            return ParallelEncoders.seeded(drawn, self.networks, cache.seed)

        def ensemble(name: str, objective: EMKD) -> SequenceEncoder:
            return cache.train(name, start, objective, epochs=self.member_epochs, **settings)

        def network(number: int) -> SequenceEncoder:
            model = ensemble(ENSEMBLE, together)
            assert isinstance(model, ParallelEncoders)
            return model.networks[number]

        def control() -> SequenceEncoder:
            epochs = self.member_epochs * self.networks * self.views
            begin = base if self.start == "base" else partial(self.untrained, cache)
            return cache.train(CONTROL, begin, masked, epochs=epochs, **settings)

        networks = {name: partial(network, number) for number, name in enumerate(self.names())}
        member_set = MemberSet(cache, networks, self.fisher_sequences)
        return {
            **({"base": base} if self.start == "base" else {}),
            ENSEMBLE: partial(ensemble, ENSEMBLE, together),
            **networks,
            **member_set.merge("uniform merge", method="uniform"),
            **member_set.fisher_merges(),
            APART: partial(ensemble, APART, alone),
            CONTROL: control,
        }
