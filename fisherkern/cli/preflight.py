"""`fisherkern preflight`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisherkern.cli.arguments import command
from fisherkern.cli.run import Run, on_validation
from fisherkern.encoders import SequenceEncoder
from fisherkern.evaluation import Report
from fisherkern.merging import Preflight, preflight
from fisherkern.tables import print_table


@command("preflight", preflight)
def preflight_checkpoints(
    run: Run, checkpoints: list[Path], *, base: Path | None = None, batch_size: int = 256
) -> None:
    """Tell what to expect of a merge: how far the members are apart, and what to do.

    Args:
        checkpoints: model files.
        base: the checkpoint that the members started from.
        batch_size: users ranked at once.
    """
    out = run.out("preflight")
    models = [run.model(path) for path in checkpoints]
    known: dict[str, Any] = run.of(preflight)
    known["base"] = None if base is None else run.model(base)
    if run.values["data"] is not None:
        known |= _measures(run, models)
    found = preflight(models, **known)
    run.finish(out, found.to_dict())
    _show(found, checkpoints)


def _measures(run: Run, models: Sequence[SequenceEncoder]) -> dict[str, Any]:
    """Give the score and the hits of a member, both of one evaluation."""
    data, size = run.data(), run.values["batch_size"]
    members, reports = {id(model) for model in models}, dict[int, Report]()

    def report(model: SequenceEncoder) -> Report:
        found = reports.get(id(model)) or on_validation(model, data, size)
        if id(model) in members:
            reports[id(model)] = found
        return found

    return {
        "score": lambda model: report(model)["ndcg@10"],
        "hits": lambda model: report(model).per_user["hr@10"],
    }


def _show(found: Preflight, checkpoints: Sequence[Path]) -> None:
    rows: list[dict[str, Any]]
    rows = [{"member": number, "file": str(path)} for number, path in enumerate(checkpoints)]
    for row, score in zip(rows, found.scores or [], strict=False):
        row["validation NDCG@10"] = score
    print_table(rows)
    for title, matrix in (
        ("cosine of weights", found.cosine),
        ("cosine of changes from the base", found.task_cosine),
        (
            "share of users that exactly one of the two models gets right in its top 10",
            found.inconsistency,
        ),
    ):
        if matrix is not None:
            print(f"{title}:")
            print_table(
                [
                    {"member": a, **{str(b): value for b, value in enumerate(row)}}
                    for a, row in enumerate(matrix)
                ],
                digits=".3f",
            )
    for path in found.paths or []:
        a, b = path["members"]
        scores = " ".join(f"{score:.4f}" for score in path["scores"])
        print(f"validation NDCG@10 on the line from {a} to {b}: {scores}")
    print(found.verdict)
    print(found.record)
    first = "align, then " if found.recipe["align"] else ""
    last = ", then train on" if found.recipe["fine_tune"] else ""
    print(f"recipe: {first}merge by {found.recipe['merge']['method']}{last}")
