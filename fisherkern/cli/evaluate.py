"""`fisherkern evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fisherkern.cli.arguments import command
from fisherkern.cli.run import BEST_DEVICE, Run, over_catalogue_of
from fisherkern.evaluation import Popularity, Report, compare, evaluate
from fisherkern.evaluation.candidates import CANDIDATES
from fisherkern.evaluation.report import SPLITS
from fisherkern.tables import print_table


@command("evaluate", evaluate, choices={"split": SPLITS, "candidates": CANDIDATES})
def evaluate_checkpoint(
    run: Run,
    checkpoint: Path,
    *,
    against: Path | None = None,
    popularity: bool = False,
    shard: bool = False,
    device: str = BEST_DEVICE,
) -> None:
    """Measure the ranking metrics of a checkpoint.

    Args:
        checkpoint: a model file.
        against: a checkpoint to compare with, user by user.
        popularity: rank by popularity too, and where the data have times by that of the last 7
            days, and compare with both.
        shard: read folders x.dcp by rows of their item tables, each process of torchrun its own.
        device: cpu, cuda or cuda:1.
    """
    out = run.out(f"evaluate-{checkpoint.stem}")
    data = run.data()
    own, reports = data, []
    for path in [checkpoint] + ([against] if against else []):
        model = run.model(path, shard=shard)
        own = over_catalogue_of(model, data, path)
        reports.append((str(path), evaluate(model, **{**run.of(evaluate), "data": own})))
    if popularity:
        rows = {"popularity": Popularity(own)}
        if own.times is not None:
            rows["popularity of the last 7 days"] = Popularity(own, days=7)
        given = {**run.of(evaluate), "data": own}
        reports += [(name, evaluate(row.to(run.device), **given)) for name, row in rows.items()]
    result: dict[str, Any] = {name: report.to_json() for name, report in reports}
    for name, report in reports:
        print(name)
        show_report(report)
    for name, report in reports[1:]:
        difference = compare(reports[0][1], report)
        result["difference" if name == str(against) else f"over {name}"] = difference.to_json()
        print(f"{checkpoint} minus {name}\n{difference.table()}")
    run.finish(out, result)


def show_report(report: Report) -> None:
    """Print the protocol in a line, then a row for each metric and a column for each cut-off."""
    print(report.headline())
    rows: dict[str, dict[str, object]] = {}
    for metric, value in report.items():
        name, _, k = metric.partition("@")
        rows.setdefault(name, {"metric": name.upper()})[f"@{k}"] = value
    print_table(list(rows.values()))
