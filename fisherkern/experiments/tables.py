"""Rows and tables of an experiment, every difference with its paired interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fisherkern.evaluation import Report, compare

CONTROL = "all users, same compute"
METRIC = "ndcg@10"


def story_rows(
    models: Mapping[str, Any], reports: Mapping[str, tuple[Report, Report]], best: str
) -> list[dict[str, Any]]:
    """One JSON row per model: metrics, paired differences, share of the ensemble's gain.

    `reports`: name -> (validation, test). `best` names the best member by validation.
    The share is (model − best member) / (ensemble − best member) in test NDCG@10.
    """
    gain = reports["score ensemble"][1][METRIC] - reports[best][1][METRIC]
    rows = []
    for name in models:
        validation, test = reports[name]
        over_best = compare(test, reports[best][1])[METRIC]
        rows.append(
            {
                "model": name,
                "best_member": name == best,
                "validation_ndcg@10": validation[METRIC],
                **{metric: test[metric] for metric in test},
                "over_best_member": dataclasses.asdict(over_best),
                "over_all_users": dataclasses.asdict(compare(test, reports[CONTROL][1])[METRIC]),
                "over_uniform": dataclasses.asdict(
                    compare(test, reports["uniform merge"][1])[METRIC]
                ),
                "share_of_ensemble_gain": over_best.mean / gain if gain > 0 else None,
            }
        )
    return rows


def story_table(rows: Sequence[Mapping[str, Any]], protocol: str) -> str:
    """The rows as Markdown under a line that states the protocol."""
    lines = [
        f"{protocol}; ± is 1.96 standard errors, paired per user.",
        "",
        "| model | NDCG@10 | HR@10 | over the best member | over all users, same compute"
        " | share of the ensemble's gain |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        name = f"{row['model']} (best member)" if row["best_member"] else row["model"]
        share = row["share_of_ensemble_gain"]
        lines.append(
            f"| {name} | {row['ndcg@10']:.4f} | {row['hr@10']:.4f}"
            f" | {_difference(row['over_best_member'])} | {_difference(row['over_all_users'])}"
            f" | {'' if share is None or row['best_member'] else f'{100 * share:.0f} %'} |"
        )
    return "\n".join(lines)


def _difference(d: Mapping[str, float]) -> str:
    if d["mean"] == 0 and d["standard_error"] == 0:
        return ""
    return f"{d['mean']:+.4f} ± {1.96 * d['standard_error']:.4f}"
