"""How often preflight is right: python -m benchmarks.preflight_record FOLDER... --out FILE

Each folder holds an experiment's members (`python -m benchmarks.experiments free-fisher ...`).
Every two of them, and all of them, are averaged: does the average beat the member that is best on
validation? A line of the CSV has what is known before (cosines, scores on validation) and what
came out on the test split. Without folders the file is judged as it stands. What it says of
`benchmarks/results/preflight.csv` goes into the package, where `preflight` reads it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fisherkern as fk
from benchmarks.common import RESULTS
from benchmarks.experiments.artifacts import ArtifactCache
from fisherkern.files import read_json, write_json
from fisherkern.merging.preflight import NEAR

METRIC = "ndcg@10"
COSINES, SCORES = "the cosine of weights", "scores on the path"
STORED = RESULTS / "preflight.csv"
RECORD = Path(fk.__file__).parent / "merging" / "preflight_record.json"
KNOWN = ("cosine", "task_cosine", "best", "mean", "validation")
COLUMNS = ("set", "data", "members", *KNOWN, "test", "low", "high")


def measure(folder: Path, users: int) -> list[dict[str, Any]]:
    """The lines of one experiment's members."""
    config = read_json(folder / "config.json")
    data = fk.load(config["data"])
    chosen = ArtifactCache(data, folder, 0).spread_users(users)
    paths = sorted((folder / "seed-0").glob("member-?.safetensors"))
    models = {path.stem[-1]: fk.load_model(path) for path in paths}
    base = fk.load_model(folder / "seed-0" / "base.safetensors")

    def reports(model: Any) -> dict[str, fk.Report]:
        return {
            split: fk.evaluate(model, data, split=split, users=chosen, k=10, progress=False)
            for split in ("validation", "test")
        }

    own = {name: reports(model) for name, model in models.items()}
    names = list(models)
    lines = []
    for group in dict.fromkeys([*itertools.combinations(names, 2), tuple(names)]):
        members = [models[name] for name in group]
        found = fk.preflight(members, base=base)
        scores = {name: own[name]["validation"][METRIC] for name in group}
        best = max(scores, key=lambda name: scores[name])
        merged = reports(fk.merge(members, method="uniform"))
        gain = fk.compare(merged["test"], own[best]["test"])[METRIC]
        away = ~np.eye(len(group), dtype=bool)
        lines.append(
            {
                "set": folder.name,
                "data": config["data"],
                "members": "+".join(group),
                "cosine": float(np.array(found.cosine)[away].min()),
                "task_cosine": float(np.array(found.task_cosine)[away].min()),
                "best": scores[best],
                "mean": sum(scores.values()) / len(scores),
                "validation": merged["validation"][METRIC] - scores[best],
                "test": gain.mean,
                "low": gain.low,
                "high": gain.high,
            }
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def fitted(lines: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The features and outcomes of a regression, as shares of the best member's score.

    An average gains by what differs between members, and loses by how far they are behind the best.
    """
    features = [[1 - v["task_cosine"], 1 - v["mean"] / v["best"], 1.0] for v in lines]
    return np.array(features), np.array([v["test"] / v["best"] for v in lines])


def leave_one_out(lines: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Every line's predicted gain, by a regression on the lines of the other sets."""
    features, outcomes = fitted(lines)
    sets = np.array([line["set"] for line in lines])
    predicted = np.empty(len(lines))
    for name in np.unique(sets):
        other = sets != name
        weights, *_ = np.linalg.lstsq(features[other], outcomes[other], rcond=None)
        predicted[~other] = features[~other] @ weights
    return predicted


def judge(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often each way to tell is right about the sign of the gain."""
    gain = np.array([line["test"] for line in lines])
    clear = np.array([line["low"] > 0 or line["high"] < 0 for line in lines])
    predicted = leave_one_out(lines)
    _, outcomes = fitted(lines)
    ways = {
        COSINES: np.array([line["cosine"] >= NEAR for line in lines]),
        "cosines and members' scores, other sets": predicted > 0,
        SCORES: np.array([line["validation"] > 0 for line in lines]),
    }
    return {
        "merges": len(lines),
        "sets": len({line["set"] for line in lines}),
        "gained": int((gain > 0).sum()),
        "clear": int(clear.sum()),
        "right": {name: int((says == (gain > 0)).sum()) for name, says in ways.items()},
        "right where clear": {
            name: int((says == (gain > 0))[clear].sum()) for name, says in ways.items()
        },
        "mean error of the predicted gain": float(np.abs(predicted - outcomes).mean()),
        "mean error of predicting none": float(np.abs(outcomes).mean()),
        "regression": np.linalg.lstsq(*fitted(lines), rcond=None)[0].tolist(),
    }


def counts(judged: Mapping[str, Any]) -> dict[str, int]:
    """What `preflight` says of its record."""
    right = judged["right"]
    return {"merges": judged["merges"], "cosines": right[COSINES], "scores": right[SCORES]}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a CSV."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    text = ("set", "data", "members")
    return [{k: v if k in text else float(v) for k, v in row.items()} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument("--users", type=int, default=10**6, help="users ranked at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for folder in options.folders:
        lines = measure(folder, options.users)
        new = not options.out.exists()
        with options.out.open("a", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(lines)
    judged = judge(read(options.out))
    for name, value in judged.items():
        print(f"{name}: {value}")
    if options.out == STORED:
        write_json(RECORD, counts(judged))
    return 0


if __name__ == "__main__":
    sys.exit(main())
