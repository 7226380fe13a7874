"""Three branches of one base, merged: by shards of users, by seeds, by mask ratios."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
from torch import nn

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import Experiment, RowBuilders
from benchmarks.experiments.figures import (
    COST,
    CURVES,
    PLANE,
    Figures,
    draw_cost,
    draw_curves,
    draw_plane,
)
from benchmarks.experiments.member_set import Estimate, MemberSet, ModelBuilder
from fisherkern.data import SequenceDataset
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives import MaskedItems

KINDS = ("shards", "seeds", "masking")
MASK_RATIOS = (0.1, 0.2, 0.4)
CONTROL = "all users, same compute"
NAMES = ("member 1", "member 2", "member 3")
UNIFORM, FISHER = "uniform merge", "fisher merge"


@dataclasses.dataclass(frozen=True)
class ShardMerge(Experiment):
    """Fine-tune three branches of one base by shard of users, seed or mask ratio, and merge.

    The base is trained at a constant rate; the members' rate decays to zero. The merges must
    beat the best member, and one model fine-tuned on all users with the members' total compute.
    The ensemble of the members' scores, which costs three times as much, is beside them.

    Args:
        members: the difference between them: "shards" (a disjoint third of the users each),
            "seeds" or "masking" (ratio 0.1, 0.2, 0.4), the last two on all users.
        base_epochs: passes of the base over the users.
        member_epochs: passes of each member over its users.
        mask_ratio: share of masked items.
        last_ratio: as `MaskedItems` takes it.
        sampler: of the Fishers.
        floor: weight of the plain average in the Fisher merges.
        cost_sequences: sequences of the figure of time and error.
        plane_users: users of the scores on the plane.
    """

    members: str = "shards"
    base_epochs: int = 60
    member_epochs: int = 30
    mask_ratio: float = 0.2
    last_ratio: float = 0.0
    sampler: str = "exact"
    floor: float = 0.1
    cost_sequences: int = 256
    plane_users: int = 500

    NAME: ClassVar = "merge"
    ENSEMBLE: ClassVar = "score ensemble"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.members not in KINDS:
            raise InputError(f"members: {self.members!r} is not one of {', '.join(KINDS)}")

    def references(self) -> dict[str, Sequence[str]]:
        return {"best member": NAMES, CONTROL: [CONTROL], UNIFORM: [UNIFORM]}

    def objective(self, ratio: float) -> MaskedItems:
        return MaskedItems(ratio, last_ratio=self.last_ratio)

    def base_model(self, cache: ArtifactCache) -> SequenceEncoder:
        return self.common_base(cache, self.objective(self.mask_ratio), self.base_epochs)

    def member_data(self, data: SequenceDataset, seed: int) -> dict[str, SequenceDataset]:
        """Each member's data."""
        if self.members != "shards":
            return dict.fromkeys(NAMES, data)
        order = np.random.default_rng(seed).permutation(data.num_users)
        shards = np.array_split(order, len(NAMES))
        return {
            name: data.subset(np.sort(users)) for name, users in zip(NAMES, shards, strict=True)
        }

    def tuned(
        self,
        cache: ArtifactCache,
        name: str,
        number: int,
        data: SequenceDataset,
        epochs: int,
        ratio: float,
    ) -> SequenceEncoder:
        """The base, fine-tuned; number: of the training's seed."""
        settings: dict[str, Any] = {"schedule": "linear", **self.training()}
        return cache.train(
            name,
            partial(self.base_model, cache),
            self.objective(ratio),
            data=data,
            epochs=epochs,
            seed=cache.seed + number,
            **settings,
        )

    def member_set(self, cache: ArtifactCache) -> MemberSet:
        data, builders = self.member_data(cache.data, cache.seed), dict[str, ModelBuilder]()
        for number, name in enumerate(NAMES):
            ratio = MASK_RATIOS[number] if self.members == "masking" else self.mask_ratio
            builders[name] = partial(
                self.tuned, cache, name, number + 1, data[name], self.member_epochs, ratio
            )
        return MemberSet(cache, builders, sequences=cache.data.num_users, data=data)

    def control(self, cache: ArtifactCache) -> SequenceEncoder:
        parts = self.member_data(cache.data, cache.seed).values()
        share = sum(part.num_users for part in parts) / cache.data.num_users
        epochs = round(self.member_epochs * share)
        return self.tuned(cache, CONTROL, 4, cache.data, epochs, self.mask_ratio)

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        members = self.member_set(cache)
        fishers = partial(members.fishers, Estimate(self.sampler))
        weighted: dict[str, Any] = {"method": "fisher", "fishers": fishers}
        search: dict[str, Any] = {"weights": "search", "score": cache.score, "seed": cache.seed}
        return {
            "base": partial(self.base_model, cache),
            **members.members,
            CONTROL: partial(self.control, cache),
            **members.merge(UNIFORM, method="uniform"),
            **members.merge(FISHER, floor=self.floor, **weighted),
            **members.merge(f"{FISHER}, floor 1", floor=1.0, **weighted),
            **members.merge(f"{FISHER}, searched weights", floor=self.floor, **search, **weighted),
            **members.ensemble(),
        }

    def figures(self, cache: ArtifactCache) -> Figures:
        rows = self.rows(cache)

        def built(*names: str) -> Mapping[str, nn.Module]:
            return {name: rows[name]() for name in names}

        members, others = partial(built, *NAMES), partial(built, "base", UNIFORM, FISHER)
        shown = partial(built, "base", *NAMES, UNIFORM, FISHER)
        score = partial(cache.score, users=cache.spread_users(self.plane_users))
        return {
            COST: partial(draw_cost, cache, partial(self.base_model, cache), self.cost_sequences),
            CURVES: partial(draw_curves, cache, shown, self.max_len),
            PLANE: partial(draw_plane, cache, members, others, score),
        }
