"""The table of exact Fishers beside free ones: merges of members that fine-tune one base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments.contrastive import UNIFORM
from benchmarks.experiments.free_fisher import titles, weighted_titles
from benchmarks.experiments.member_set import EXACT, FREE
from benchmarks.experiments.tables import difference
from fisherkern.files import read_json

RESULTS = Path(__file__).parent / "results"
# What the members of an experiment on the free Fisher are, and its folder.
OF_FREE = [
    (f"{members}{data}", f"free_{name}_{kind}")
    for kind, members in (
        ("users", "each on a third of the users"),
        ("uneven", "each on 76, 19 or 5 % of the users"),
        ("time", "each on half of every history"),
        ("regions", "two regions, half of the items sold in both"),
        ("seeds", "three seeds, all data, a constant rate"),
        ("early", "three seeds, ten passes together, decayed rates"),
        ("strong", "three seeds of a strong base (D = 256), decayed rates"),
    )
    for name, data in (("ml-1m", ""), ("beauty", ", Amazon Beauty"))
]


def free_rows(results: Path = RESULTS, lines: Sequence[tuple[str, str]] = tuple(OF_FREE)) -> str:
    """A line for each experiment on the free Fisher; of each kind the better on validation."""
    heads = "uniform merge, over it", "exact over uniform", "free over uniform", "exact over free"
    found = [
        f"| members | seeds | best member, NDCG@10 | {' | '.join(heads)} |",
        f"|---|{'---:|' * (2 + len(heads))}",
    ]
    for members, folder in lines:
        path = results / folder / "result.json"
        if not path.exists():
            continue
        result = read_json(path)
        rows = {row["model"]: row for row in result["tables"][-1]["rows"]}
        exact, free = (
            max(
                (t for t in [*titles(estimate), *weighted_titles(estimate)] if t in rows),
                key=lambda title: float(rows[title]["validation_ndcg@10"]),
            )
            for estimate in (EXACT, FREE)
        )
        best = rows[UNIFORM]["over"]["best member"]["model"]
        gaps = [rows[UNIFORM]["over"]["best member"]]
        gaps += [rows[name]["over"][UNIFORM] for name in (exact, free)]
        gaps += [rows[exact]["over"]["free Fisher"]]
        cells = [difference(gap) for gap in gaps]
        count = len(result["seeds"])
        found.append(f"| {members} | {count} | {rows[best]['ndcg@10']:.4f} | {' | '.join(cells)} |")
    return "\n".join(found)
