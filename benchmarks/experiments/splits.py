"""Members that fine-tune a base on different users, times or items."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.data_parts import (
    action_positions,
    item_count_weights,
    training_subset,
    with_catalogue,
)
from benchmarks.experiments.experiment import BEAUTY, Experiment, RowBuilders
from benchmarks.experiments.member_set import MemberSet
from fisherkern.data import SequenceDataset
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives import MaskedItems, Objective

BY = ("users", "time", "regions", "seeds")
CONTROL = "all data, as many windows as all members"
WEIGHTED = "weighted by users"


@dataclasses.dataclass(frozen=True)
class Splits(Experiment):
    """Fine-tune a common base on parts of the data, a member each, and merge.

    By "users", parts are disjoint random users; by "time", consecutive slices of every user's
    training items; by "regions", disjoint users with a catalogue for each region; by "seeds",
    every part is all of the data. A region's model has rows for its own items alone; ranked over
    all items, it takes the base's rows for the others.

    Args:
        by: "users", "time", "regions" or "seeds".
        parts: number of members.
        size_ratio: users of a part for each user of the part before. Below 1 there are rows
            weighted by users as well.
        shared: share of the items that all regions sell; every other item is sold in one region,
            and actions on it elsewhere are left out.
        mask_ratio: share of masked items.
        base_epochs: passes of the base.
        member_epochs: passes of each member over its part.
        fisher_sequences: training pairs of every Fisher.
    """

    by: str = "users"
    parts: int = 2
    size_ratio: float = 1.0
    shared: float = 0.5
    mask_ratio: float = 0.2
    base_epochs: int = 60
    member_epochs: int = 30
    fisher_sequences: int = 2000

    PRESETS: ClassVar = {"beauty": {**BEAUTY, "base_epochs": 40, "member_epochs": 15}}
    ENSEMBLE: ClassVar[str | None] = "score ensemble"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in BY:
            raise InputError(f"by: {self.by!r} is not one of {', '.join(BY)}")
        if self.parts < 2:
            raise InputError(f"parts: must be at least 2, got {self.parts}")
        if not 0 < self.shared <= 1:
            raise InputError(f"shared: must be in (0, 1], got {self.shared}")
        if not 0 < self.size_ratio <= 1:
            raise InputError(f"size_ratio: must be in (0, 1], got {self.size_ratio}")
        if self.by in ("time", "seeds") and self.size_ratio != 1:
            raise InputError(f"size_ratio: parts by {self.by} have the same users")

    def names(self) -> list[str]:
        return [f"member {number + 1}" for number in range(self.parts)]

    def references(self) -> dict[str, Sequence[str]]:
        weighted = {WEIGHTED: [WEIGHTED]} if self.size_ratio < 1 else {}
        return {
            "best member": self.names(),
            "uniform merge": ["uniform merge"],
            **weighted,
            "all data": [CONTROL],
        }

    def member_data(self, data: SequenceDataset, seed: int) -> dict[str, SequenceDataset]:
        """Each member's data."""
        if self.by == "seeds":
            return dict.fromkeys(self.names(), data)
        random = np.random.default_rng(seed)
        lengths = np.diff(data.offsets)
        if self.by == "time":
            share = action_positions(data) / np.repeat(np.maximum(lengths - 2, 1), lengths)
            slices = np.minimum((share * self.parts).astype(int), self.parts)
            masks = [slices == number for number in range(self.parts)]
            return {
                n: training_subset(data, mask) for n, mask in zip(self.names(), masks, strict=True)
            }
        region = np.repeat(self.part_of(random.permutation(data.num_users)), lengths)
        sold = random.permutation(data.num_items) % self.parts
        if self.by == "users":
            sold[:] = -1
        else:
            sold[random.random(data.num_items) < self.shared] = -1
        parts = {}
        for number, name in enumerate(self.names()):
            here = (sold == -1) | (sold == number)
            ids = [item for item, kept in zip(data.item_ids, here, strict=True) if kept]
            parts[name] = training_subset(data, (region == number) & here[data.items - 1], ids)
        return parts

    def part_of(self, users: NDArray[np.int64]) -> NDArray[np.int64]:
        """The part of each user, of whom 0..num_users-1 say a random order."""
        if self.size_ratio == 1:
            return users % self.parts
        ends = np.cumsum(self.size_ratio ** np.arange(self.parts))
        return np.searchsorted(ends, (users + 0.5) * ends[-1] / len(users))

    def objective(self) -> Objective:
        """The loss of every training."""
        return MaskedItems(self.mask_ratio)

    def schedule_of_members(self) -> str:
        """Whether a member's learning rate decays."""
        return "linear"

    def base_model(self, cache: ArtifactCache) -> SequenceEncoder:
        """The model that all members start from."""
        return self.common_base(cache, self.objective(), self.base_epochs)

    def member(
        self, cache: ArtifactCache, number: int, name: str, data: SequenceDataset
    ) -> SequenceEncoder:
        """The base, fine-tuned on a member's data."""

        def start() -> SequenceEncoder:
            return with_catalogue(self.base_model(cache), data.item_ids)

        return cache.train(
            name,
            start,
            self.objective(),
            data=data,
            epochs=self.member_epochs,
            seed=cache.seed + 1000 * number,
            schedule=self.schedule_of_members(),
            **self.training(),
        )

    def member_set(self, cache: ArtifactCache) -> MemberSet:
        data = self.member_data(cache.data, cache.seed)
        members = {
            name: partial(self.member, cache, number, name, data[name])
            for number, name in enumerate(self.names(), start=1)
        }

        def to_catalogue(model: SequenceEncoder) -> SequenceEncoder:
            return with_catalogue(model, cache.data.item_ids, self.base_model(cache))

        return MemberSet(
            cache, members, self.fisher_sequences, data=data, to_catalogue=to_catalogue
        )

    def fisher_rows(self, member_set: MemberSet) -> RowBuilders:
        """The rows of the merges by Fishers."""
        return dict(member_set.fisher_merges())

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        member_set, base = self.member_set(cache), partial(self.base_model, cache)
        data = [member_set.data_of(name) for name in self.names()]

        def over_catalogue(build: Callable[[], SequenceEncoder]) -> SequenceEncoder:
            return member_set.over_catalogue(build())

        def control() -> SequenceEncoder:
            share = sum(part.num_users for part in data) / cache.data.num_users
            return cache.train(
                CONTROL,
                base,
                self.objective(),
                epochs=round(self.member_epochs * share),
                seed=cache.seed + 1000 * (self.parts + 1),
                schedule="linear",
                **self.training(),
            )

        def counts() -> list[Any]:
            pairs = zip(member_set.models(), data, strict=True)
            return [item_count_weights(model, part, cache.data.num_items) for model, part in pairs]

        weighted: dict[str, Callable[[], SequenceEncoder]] = {}
        if self.size_ratio < 1:
            users = [part.num_users for part in data]
            weighted = {
                **member_set.merge(WEIGHTED, method="weighted", weights=users),
                **member_set.fisher_merges(title=f"Fisher merge {WEIGHTED}", weights=users),
            }
        return {
            "base": base,
            **{name: partial(over_catalogue, b) for name, b in member_set.members.items()},
            **member_set.merge("uniform merge", method="uniform"),
            **self.fisher_rows(member_set),
            **weighted,
            **member_set.merge(
                "rows weighted by item counts", fishers=counts, normalize=None, floor=0.1
            ),
            **member_set.merge("task arithmetic", method="task_arithmetic", base=base),
            **member_set.ensemble(),
            CONTROL: control,
        }
