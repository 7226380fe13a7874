"""The table of two markets: their networks, the merges, and one network on pooled data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.experiments.splits import CONTROL
from benchmarks.experiments.tables import INTERVAL, difference
from fisherkern.errors import InputError
from fisherkern.files import read_json

RESULTS = Path(__file__).parent / "results"
DATA = {"MovieLens-1M": "splits_ml-1m_regions", "Amazon Beauty": "splits_beauty_regions"}
BEST = "member 2"
# A row's name in the table, and in result.json.
MODELS = [
    ("network of market 1", "member 1"),
    ("network of market 2 (the better on validation)", BEST),
    ("plain average of the two", "uniform merge"),
    ("Fisher merge of the two", "Fisher merge, floor 0.1"),
    ("score ensemble of the two, at twice the cost", "score ensemble"),
    ("one network on pooled data", CONTROL),
]


def market_rows(results: Path = RESULTS, data: Mapping[str, str] = DATA) -> str:
    """A line for each model; NDCG@10 and the gain over market 2 for each data set.

    Raises InputError where another market's network is the better one on validation.
    """
    stored = {name: read_json(results / folder / "result.json") for name, folder in data.items()}
    heads = " | ".join(f"{name}, NDCG@10 | over market 2" for name in stored)
    lines = [f"| model | {heads} |", f"|---|{'---:|' * (2 * len(stored))}"]
    rows = {
        name: {row["model"]: row for row in result["tables"][-1]["rows"]}
        for name, result in stored.items()
    }
    for title, model in MODELS:
        cells = []
        for name in stored:
            row = rows[name][model]
            gap = row["over"]["best member"]
            if gap["model"] != BEST:
                raise InputError(f"{name}: the best member is {gap['model']}, not {BEST}")
            cells += [f"{row['ndcg@10']:.4f}", "" if model == BEST else difference(gap)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    seeds = " and ".join(f"{len(r['seeds'])} on {name}" for name, r in stored.items())
    protocol = "Test split, full ranking, seen items excluded"
    return "\n".join([*lines, "", f"{protocol}; {INTERVAL}; seeds: {seeds}."])
