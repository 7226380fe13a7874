"""`fisherkern merge`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fisherkern.cli.common import command, finish, load_data, out_folder
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.evaluation import evaluate
from fisherkern.fisher import DiagFisher
from fisherkern.merging import RULES, merge
from fisherkern.training import load_model, save_model


def add_merge(commands: Any) -> None:
    parser = command(commands, "merge", _merge, "one model out of several checkpoints")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--fisher", type=Path, nargs="+", default=[], help="one per checkpoint")
    parser.add_argument("--method", choices=list(RULES), help="default: what the files imply")
    parser.add_argument("--weights", help="comma-separated, or 'search' (needs --data)")
    parser.add_argument("--floor", type=float, default=0.1, help="relative to the mean Fisher")


def _merge(options: argparse.Namespace) -> None:
    models = [load_model(path) for path in options.checkpoints]
    fishers = [DiagFisher.load(path) for path in options.fisher]
    weights: Any = options.weights
    score = None
    if weights == "search":
        data = load_data(options)

        def score(model: SequenceEncoder) -> float:
            return evaluate(model, data, split="validation", k=(10,))["ndcg@10"]

    elif weights is not None:
        try:
            weights = [float(part) for part in weights.split(",")]
        except ValueError:
            raise InputError(f"--weights: {weights!r} is neither numbers nor 'search'") from None
    merged = merge(
        models,
        method=options.method,
        weights=weights,
        fishers=fishers or None,
        floor=options.floor,
        score=score,
        seed=options.seed,
    )
    out = out_folder(options, "merge")
    save_model(merged, out / "merged.safetensors", extra={"merge_report": merged.merge_report})
    members = [str(path) for path in options.checkpoints]
    finish(out, options, {"members": members, "report": merged.merge_report})
    print(f"{'member':<40} weight")
    assert merged.merge_report is not None
    for path, weight in zip(members, merged.merge_report["weights"], strict=True):
        print(f"{path:<40} {weight:.4f}")
    print(f"written to {out / 'merged.safetensors'}")
