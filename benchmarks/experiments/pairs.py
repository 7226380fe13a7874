"""Whether members that err on different users are worth more together: the paper's A.1."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.contrastive import MEMBERS, Contrastive
from benchmarks.experiments.engine import ResultTable
from benchmarks.experiments.experiment import RowBuilders
from benchmarks.experiments.member_set import MemberSet
from benchmarks.experiments.tables import METRIC, difference
from fisherkern.evaluation import Report, compare

HIT = "hr@10"
PAIRS = tuple(itertools.combinations(MEMBERS, 2))
# Column -> the row's name before the pair's.
TOGETHER = {
    "ensemble": "score ensemble",
    "uniform merge": "uniform merge",
    "Fisher merge": "Fisher merge, floor 0.1",
}


def suffix_of(pair: tuple[str, str]) -> str:
    return f" of {pair[0]} and {pair[1]}"


def inconsistency(one: Report, other: Report) -> float:
    """The share of users for whom exactly one of two models has the item among its first 10."""
    return float((one.per_user[HIT] != other.per_user[HIT]).mean())


class Pairs(ResultTable):
    """Every two members: how often they differ, and what their ensemble and merges gain.

    Error inconsistency (Gontijo-Lopes et al., arXiv 2110.12899) is of hits among the first 10 on
    the test split. Gains are test NDCG@10 over the one of the two that is better on validation.
    """

    experiment: Contrastive

    def paper(self) -> tuple[Mapping[str, str], str]:
        return {}, ""

    def row_builders(self, cache: ArtifactCache) -> RowBuilders:
        members = self.experiment.members(cache)
        rows: RowBuilders = dict(members)
        for pair in PAIRS:
            both = {name: members[name] for name in pair}
            member_set = MemberSet(
                cache, both, self.experiment.fisher_sequences, suffix=suffix_of(pair)
            )
            rows |= member_set.ensemble()
            rows |= member_set.merge("uniform merge", method="uniform")
            rows |= member_set.fisher_merges(floors=[0.1])
        return rows

    def compare_rows(self, reports: Mapping[str, Mapping[str, Report]]) -> list[dict[str, Any]]:
        """A row for each pair of members that are both known."""
        rows = []
        for pair in PAIRS:
            if not all(name in reports for name in pair):
                continue
            better = max(pair, key=lambda name: reports[name]["validation"][METRIC])
            over: dict[str, Any] = {}
            for title, rule in TOGETHER.items():
                joint = reports.get(f"{rule}{suffix_of(pair)}")
                gap = None if joint is None else compare(joint["test"], reports[better]["test"])
                over[title] = None if gap is None else dataclasses.asdict(gap[METRIC])
            rows.append(
                {
                    "model": " and ".join(pair),
                    "members": list(pair),
                    "inconsistency": inconsistency(*(reports[name]["test"] for name in pair)),
                    "better": better,
                    METRIC: reports[better]["test"][METRIC],
                    "over": over,
                }
            )
        return rows

    def means(self) -> list[dict[str, Any]]:
        """As for all tables, but inconsistency, of hits, is averaged itself."""
        rows = super().means()
        for row in rows:
            each = [
                other["inconsistency"]
                for seed in self.rows
                for other in self.seed_rows(seed)
                if other["members"] == row["members"]
            ]
            row["inconsistency"] = sum(each) / len(each)
        return rows

    def markdown(self, rows: Sequence[Mapping[str, Any]], paper: Mapping[str, str]) -> str:
        heads = ["error inconsistency", "better of the two", "NDCG@10"]
        heads += [f"{title} over it" for title in TOGETHER]
        lines = [f"| members | {' | '.join(heads)} |", "|---|---:|---|" + "---:|" * 4]
        for row in rows:
            gains = ["" if gap is None else difference(gap) for gap in row["over"].values()]
            cells = [f"{100 * row['inconsistency']:.1f} %", row["better"], f"{row[METRIC]:.4f}"]
            lines.append(f"| {row['model']} | {' | '.join([*cells, *gains])} |")
        return "\n".join(lines)
