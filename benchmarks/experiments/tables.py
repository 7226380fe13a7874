"""Rows and tables of an experiment, every difference with its paired interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fisherkern.evaluation import Report, compare

METRIC = "ndcg@10"
INTERVAL = "± is 1.96 standard errors, paired per user"


def comparison_rows(
    reports: Mapping[str, tuple[Report, Report]],
    references: Mapping[str, Sequence[str]],
    ensemble: str | None,
) -> list[dict[str, Any]]:
    """One JSON row per model that there is a report of, in the order of `reports`.

    `reports`: name -> (validation, test). `references`: a column's title -> names, of which the
    one with the highest validation NDCG@10 is what the column compares with; None as long as one
    of them is missing. share_of_ensemble_gain is (model - r) / (ensemble - r) in test NDCG@10,
    r the first column's reference; None where that is not defined or the gain is not positive.
    """
    best = {
        title: max(names, key=lambda name: reports[name][0][METRIC])
        for title, names in references.items()
        if all(name in reports for name in names)
    }
    title = next(iter(references))
    first, gain = best.get(title), None
    if first is not None and ensemble is not None and ensemble in reports:
        gain = compare(reports[ensemble][1], reports[first][1])[METRIC]
    rows = []
    for name, (validation, test) in reports.items():
        over: dict[str, Any] = dict.fromkeys(references)
        for column, reference in best.items():
            gap = compare(test, reports[reference][1])[METRIC]
            over[column] = {"model": reference, **dataclasses.asdict(gap)}
        share = None
        if gain is not None and gain.low > 0:
            share = over[title]["mean"] / gain.mean
        rows.append(
            {
                "model": name,
                "chosen": name == first and len(references[title]) > 1,
                "validation_ndcg@10": validation[METRIC],
                **test,
                "over": over,
                "share_of_ensemble_gain": share,
            }
        )
    return rows


def mean_reports(reports: Sequence[Report]) -> Report:
    """Every user's metrics averaged over reports of the same users, one per seed.

    Its intervals are over users, for these seeds. `ranks` are means as well.
    """
    return dataclasses.replace(
        reports[0],
        per_user={
            metric: np.mean([report.per_user[metric] for report in reports], axis=0)
            for metric in reports[0]
        },
        ranks=np.mean([report.ranks for report in reports], axis=0),
    )


def comparison_table(
    rows: Sequence[Mapping[str, Any]], titles: Sequence[str], paper: Mapping[str, str]
) -> str:
    """`comparison_rows` as Markdown; `paper` is what a paper reports, by row.

    A row's "columns", where it has some, are numbers by title.
    """
    shares = any(row["share_of_ensemble_gain"] is not None for row in rows)
    extra = dict.fromkeys(title for row in rows for title in row.get("columns", {}))
    heads = ["NDCG@10", "HR@10", "validation NDCG@10", *(f"over {title}" for title in titles)]
    heads += ["share of the ensemble's gain"] * shares + [*extra] + ["paper"] * bool(paper)
    lines = [f"| model | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row in rows:
        cells = [f"{row[metric]:.4f}" for metric in (METRIC, "hr@10", f"validation_{METRIC}")]
        cells += [difference(row["over"][title]) if row["over"][title] else "" for title in titles]
        share = row["share_of_ensemble_gain"]
        if shares:
            cells.append("" if share is None or row["chosen"] else f"{100 * share:.0f} %")
        values = row.get("columns", {})
        cells += [_number(title, values[title]) if title in values else "" for title in extra]
        if paper:
            cells.append(paper.get(row["model"], ""))
        name = f"{row['model']} ({titles[0]})" if row["chosen"] else row["model"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(title: str, value: float) -> str:
    return f"{value:.4f}" if METRIC.upper() in title else f"{value:.3g}"


def difference(d: Mapping[str, float]) -> str:
    """A `Difference` as text with its 95 % interval; nothing for a row compared with itself."""
    if d["mean"] == 0 and d["standard_error"] == 0:
        return ""
    return f"{d['mean']:+.4f} ± {1.96 * d['standard_error']:.4f}"
