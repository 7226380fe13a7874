"""`fisherkern preflight`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisherkern.cli.common import command, finish, load_data, on_validation, out_folder
from fisherkern.encoders import SequenceEncoder
from fisherkern.evaluation import Report
from fisherkern.merging import preflight
from fisherkern.training import load_model


def add_preflight(commands: Any) -> None:
    parser = command(commands, "preflight", _preflight, "what to expect of a merge")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--base", type=Path, help="the checkpoint that the members started from")
    parser.add_argument(
        "--points", type=int, default=3, help="models between two members (default: 3; with --data)"
    )


def _preflight(options: argparse.Namespace) -> None:
    models = [load_model(path) for path in options.checkpoints]
    known: dict[str, Any] = {"points": options.points}
    if options.base is not None:
        known["base"] = load_model(options.base)
    if options.data is not None:
        data = load_data(options.data)
        # A member's score and hits are both asked for, and are of one evaluation.
        members, reports = {id(model) for model in models}, dict[int, Report]()

        def report(model: SequenceEncoder) -> Report:
            found = reports.get(id(model)) or on_validation(model, data)
            if id(model) in members:
                reports[id(model)] = found
            return found

        known["score"] = lambda model: report(model)["ndcg@10"]
        known["hits"] = lambda model: report(model).per_user["hr@10"]
    found = preflight(models, **known)
    finish(out_folder(options, "preflight"), options, found.to_dict())
    for number, path in enumerate(options.checkpoints):
        score = "" if found.scores is None else f"  validation NDCG@10 {found.scores[number]:.4f}"
        print(f"member {number}: {path}{score}")
    _print_matrix("cosine of weights", found.cosine)
    _print_matrix("cosine of changes from the base", found.task_cosine)
    _print_matrix(
        "share of users that exactly one of the two models gets right in its top 10",
        found.inconsistency,
    )
    for path in found.paths or []:
        a, b = path["members"]
        scores = " ".join(f"{score:.4f}" for score in path["scores"])
        print(f"from {a} to {b}: {scores}")
    print(found.verdict)
    first = "align, then " if found.recipe["align"] else ""
    last = ", then train on" if found.recipe["fine_tune"] else ""
    print(f"recipe: {first}merge by {found.recipe['merge']['method']}{last}")


def _print_matrix(title: str, matrix: Sequence[Sequence[float]] | None) -> None:
    if matrix is None:
        return
    print(f"{title}:")
    for row in matrix:
        print("  " + " ".join(f"{value:7.3f}" for value in row))
