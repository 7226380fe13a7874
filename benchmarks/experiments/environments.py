"""Is a risk that is alike for rare and popular items worth a penalty, or a merge?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.data_parts import training_subset
from benchmarks.experiments.experiment import Experiment, RowBuilders
from benchmarks.experiments.member_set import FREE, MemberSet
from benchmarks.experiments.tables import METRIC
from fisherkern.data import SequenceDataset
from fisherkern.encoders import SASRec, SequenceEncoder
from fisherkern.evaluation import Report, compare
from fisherkern.objectives import NextItem, Objective, VREx
from fisherkern.objectives.vrex import log_popularity, mean_log_popularity

PLAIN, BOTH = "plain", ", penalty on targets of 0.1"
# On ML-1M the share of log n that costs as much validation NDCG@10 as the smaller penalty.
LESS, SHARE = "plain, scores less 0.15 log n", 0.15
OBJECTIVES: Mapping[str, Objective] = {
    PLAIN: NextItem(),
    "penalty on targets of 0.1": VREx(NextItem(), 0.1),
    "penalty on targets of 1": VREx(NextItem(), 1.0),
    "penalty on sequences of 1": VREx(NextItem(), 1.0, "sequence"),
}


@dataclasses.dataclass(frozen=True)
class Environments(Experiment):
    """Fine-tune a base plainly, with V-REx's penalty, in parts that are merged, and with both.

    The parts are thirds of the users, by the mean log popularity of what they take. All rows have
    as many windows: a part's passes over its third add up to the others' over all users. The
    columns on unpopular targets are of the test items that hold the rarest third of the training
    actions. A rival needs no training: the plain row, its scores less a share of log popularity.

    Args:
        base_epochs: passes of the base.
        member_epochs: passes after the base, of a member over its part.
    """

    base_epochs: int = 30
    member_epochs: int = 20

    PRESETS: ClassVar = {
        "ml-1m": {"dropout": 0.2, "lr": 1e-3},
        "beauty": {"dropout": 0.5, "lr": 1e-3, "batch_size": 128},
    }

    def references(self) -> dict[str, Sequence[str]]:
        return {
            PLAIN: [PLAIN],
            "penalty": [name for name in OBJECTIVES if name != PLAIN],
            "less log n": [LESS],
            "uniform merge": ["uniform merge"],
        }

    def untrained(self, cache: ArtifactCache, *, offset: int = 0) -> SequenceEncoder:
        return cache.fresh(SASRec, offset=offset, **self.sizes())

    def tuned(
        self,
        cache: ArtifactCache,
        name: str,
        objective: Objective,
        number: int = 0,
        data: SequenceDataset | None = None,
    ) -> SequenceEncoder:
        """The base after `member_epochs` more."""
        return cache.train(
            name,
            partial(self.common_base, cache, NextItem(), self.base_epochs),
            objective,
            data=data,
            epochs=self.member_epochs,
            seed=cache.seed + 1000 * (1 + number),
            schedule="linear",
            **self.training(),
        )

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        rows: RowBuilders = {"base": partial(self.common_base, cache, NextItem(), self.base_epochs)}
        for title, objective in OBJECTIVES.items():
            rows[title] = partial(self.tuned, cache, title, objective)
        rows[LESS] = lambda: LessPopular(self.tuned(cache, PLAIN, NextItem()), cache.data)
        order = np.argsort(np.argsort(mean_log_popularity(cache.data), kind="stable"))
        third = np.repeat(3 * order // cache.data.num_users, np.diff(cache.data.offsets))
        parts = [training_subset(cache.data, third == number) for number in range(3)]
        for suffix, objective in {"": NextItem(), BOTH: VREx(NextItem(), 0.1)}.items():
            names = [f"{kind} users{suffix}" for kind in ("rare", "middle", "popular")]
            members = {
                name: partial(self.tuned, cache, name, objective, number, parts[number])
                for number, name in enumerate(names)
            }
            member_set = MemberSet(
                cache, members, 1, data=dict(zip(names, parts, strict=True)), suffix=suffix
            )
            rows |= members if not suffix else {}
            rows |= member_set.merge("uniform merge", method="uniform")
            rows |= member_set.fisher_merges((FREE,), (0.1,), title="Fisher merge")
        return rows

    def extra_columns(self, cache: ArtifactCache) -> Mapping[str, Callable[[], dict[str, float]]]:
        rows = self.rows(cache)
        return {row: partial(self.unpopular, cache, row, rows) for row in rows}

    def unpopular(self, cache: ArtifactCache, row: str, rows: RowBuilders) -> dict[str, float]:
        """NDCG@10 on unpopular targets, and its paired differences from two rows."""
        bound = VREx(NextItem()).bind(cache.data, self.max_len)
        assert bound.log_popularity is not None and bound.bounds is not None
        user, place = cache.data.targets("test")
        score = bound.log_popularity.numpy()[cache.data.items[place]]
        rare = user[score < float(bound.bounds[0])]

        def of_rare(name: str) -> Report:
            report = cache.row_reports(name, rows[name])[1]
            kept = np.isin(report.users, rare)
            return dataclasses.replace(
                report,
                per_user={METRIC: report.per_user[METRIC][kept]},
                users=report.users[kept],
                ranks=report.ranks[kept],
            )

        own = of_rare(row)
        columns = {"unpopular targets, NDCG@10": own[METRIC]}
        for title, other in (("plain", PLAIN), ("less log n", LESS)):
            gap = compare(own, of_rare(other))[METRIC]
            columns |= {
                f"over {title} there, NDCG@10": gap.mean,
                f"± over {title}, NDCG@10": 1.96 * gap.standard_error,
            }
        return columns


class LessPopular(nn.Module):
    """A model whose scores are less `SHARE` times the items' log popularity."""

    def __init__(self, model: SequenceEncoder, data: SequenceDataset) -> None:
        super().__init__()
        self.model, self.max_len, self.first_item = model, model.max_len, model.first_item
        self.item_ids = model.item_ids
        self.register_buffer("less", torch.from_numpy(SHARE * log_popularity(data)[1:]).float())

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.model(batch) - self.less
