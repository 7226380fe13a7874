"""`fisherkern evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fisherkern.cli.common import command, finish, load_data, out_folder, over_catalogue_of
from fisherkern.evaluation import compare, evaluate
from fisherkern.evaluation.candidates import CANDIDATES
from fisherkern.training import load_model


def add_evaluate(commands: Any) -> None:
    parser = command(commands, "evaluate", _evaluate, "ranking metrics of a checkpoint")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--against", type=Path, help="a checkpoint to compare with, paired")
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--candidates", choices=CANDIDATES, default="full")
    parser.add_argument(
        "--seen", default="exclude", help="exclude, keep, or last-N: exclude the last N places'"
    )
    parser.add_argument("--k", type=int, nargs="+", default=[5, 10, 20])


def _evaluate(options: argparse.Namespace) -> None:
    data = load_data(options.data)
    paths = [options.checkpoint] + ([options.against] if options.against else [])
    reports = []
    for path in paths:
        model = load_model(path)
        reports.append(
            evaluate(
                model,
                over_catalogue_of(model, data, path),
                split=options.split,
                k=tuple(options.k),
                candidates=options.candidates,
                seen=options.seen,
                seed=options.seed,
                progress=not options.quiet,
            )
        )
    result = {str(path): r.to_json() for path, r in zip(paths, reports, strict=True)}
    for path, report in zip(paths, reports, strict=True):
        print(f"{path}\n{report.table()}")
    if options.against:
        difference = compare(reports[0], reports[1])
        result["difference"] = difference.to_json()
        print(f"{paths[0]} minus {paths[1]}\n{difference.table()}")
    finish(out_folder(options, f"evaluate-{options.checkpoint.stem}"), options, result)
