"""`fisherkern evaluate`."""

from __future__ import annotations

from pathlib import Path

from fisherkern.cli.arguments import command
from fisherkern.cli.run import BEST_DEVICE, Run, over_catalogue_of
from fisherkern.evaluation import Report, compare, evaluate
from fisherkern.evaluation.candidates import CANDIDATES
from fisherkern.evaluation.report import SPLITS
from fisherkern.tables import print_table


@command("evaluate", evaluate, choices={"split": SPLITS, "candidates": CANDIDATES})
def evaluate_checkpoint(
    run: Run, checkpoint: Path, *, against: Path | None = None, device: str = BEST_DEVICE
) -> None:
    """Measure the ranking metrics of a checkpoint.

    Args:
        checkpoint: a model file.
        against: a checkpoint to compare with, user by user.
        device: cpu, cuda or cuda:1.
    """
    out = run.out(f"evaluate-{checkpoint.stem}")
    data = run.data()
    paths = [checkpoint] + ([against] if against else [])
    reports = []
    for path in paths:
        model = run.model(path)
        given = {**run.of(evaluate), "data": over_catalogue_of(model, data, path)}
        reports.append(evaluate(model, **given))
    result = {str(path): r.to_json() for path, r in zip(paths, reports, strict=True)}
    for path, report in zip(paths, reports, strict=True):
        print(path)
        show_report(report)
    if against:
        difference = compare(reports[0], reports[1])
        result["difference"] = difference.to_json()
        print(f"{paths[0]} minus {paths[1]}\n{difference.table()}")
    run.finish(out, result)


def show_report(report: Report) -> None:
    """Print the protocol in a line, then a row for each metric and a column for each cut-off."""
    print(f"{report.protocol}, {report.num_users:,} users")
    rows: dict[str, dict[str, object]] = {}
    for metric, value in report.items():
        name, _, k = metric.partition("@")
        rows.setdefault(name, {"metric": name.upper()})[f"@{k}"] = value
    print_table(list(rows.values()))
