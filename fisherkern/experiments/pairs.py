"""Whether members that err on different users are worth more together: the paper's A.1."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fisherkern.evaluation import Report, compare
from fisherkern.experiments.contrastive import MEMBERS, Contrastive
from fisherkern.experiments.engine import Table
from fisherkern.experiments.experiment import Rows
from fisherkern.experiments.family import Family
from fisherkern.experiments.lab import Lab
from fisherkern.experiments.tables import METRIC, difference

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


class Pairs(Table):
    """Every two members: how often they differ, and what their ensemble and merges gain.

    Error inconsistency (Gontijo-Lopes et al., arXiv 2110.12899) is of hits among the first 10 on
    the test split. Gains are test NDCG@10 over the one of the two that is better on validation.
    """

    experiment: Contrastive

    def paper(self) -> tuple[Mapping[str, str], str]:
        return {}, ""

    def plan(self, lab: Lab) -> Rows:
        members = self.experiment.members(lab)
        rows: Rows = dict(members)
        for pair in PAIRS:
            own = {name: members[name] for name in pair}
            family = Family(lab, own, self.experiment.fisher_sequences, suffix=suffix_of(pair))
            rows |= family.ensemble()
            rows |= family.merge("uniform merge", method="uniform")
            rows |= family.fisher_merges(floors=[0.1])
        return rows

    def compared(self, reports: Mapping[str, Mapping[str, Report]]) -> list[dict[str, Any]]:
        """A row for each pair of members that are both known."""
        rows = []
        for pair in PAIRS:
            if not all(name in reports for name in pair):
                continue
            better = max(pair, key=lambda name: reports[name]["validation"][METRIC])
            over: dict[str, Any] = {}
            for title, rule in TOGETHER.items():
                found = reports.get(f"{rule}{suffix_of(pair)}")
                gap = None if found is None else compare(found["test"], reports[better]["test"])
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
                found["inconsistency"]
                for seed in self.rows
                for found in self.seed_rows(seed)
                if found["members"] == row["members"]
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
