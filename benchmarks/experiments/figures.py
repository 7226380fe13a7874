"""The figures of the Fisher paper, of any models: numbers first, stored, then PNG files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.experiments.artifacts import ArtifactCache, OutOfTime
from benchmarks.experiments.fisher_cost import cost_table, fisher_cost
from fisherkern import plots
from fisherkern.encoders import SequenceEncoder
from fisherkern.files import atomic_path
from fisherkern.report.plane import weight_plane

GRID_SIZE = 9  # points along each side of the plane
TOP = 50  # of the sorted probabilities
BATCH = 256  # test histories that the probabilities are the mean over
COST, CURVES, PLANE = "fisher_cost", "sorted-probabilities", "plane"

# The name of a figure, and of its file -> the function that draws it to a path.
Figures = dict[str, Callable[[Path], None]]
ModelBuilders = Callable[[], Mapping[str, nn.Module]]


def draw_figures(figures: Figures, folder: Path) -> list[str]:
    """Draw the figures for which there is time; return the names of the others."""
    missing = []
    for name, draw in figures.items():
        try:
            draw(folder / f"{name}.png")
        except OutOfTime:
            missing.append(name)
    return missing


def draw_cost(
    cache: ArtifactCache, build: Callable[[], SequenceEncoder], count: int, path: Path
) -> None:
    """Time and error of every sampler on `count` sequences; a table of them beside the figure."""

    def measure() -> list[dict[str, Any]]:
        model = build()
        loader = cache.data.loader(
            split="train", batch_size=count, max_len=model.max_len, limit=count
        )
        return fisher_cost(model, list(loader), seed=cache.seed, progress=False)

    rows = cache.json("figures", COST, measure)
    # The figure has one line for each provider.
    lines = [{**row, "sampler": row["provider"]} for row in rows]
    for line in lines:
        del line["provider"]
    plots.plot_fisher_cost(lines, path)
    with atomic_path(path.with_suffix(".md")) as temporary:
        temporary.write_text(cost_table(rows) + "\n", encoding="utf-8")


def draw_curves(cache: ArtifactCache, models: ModelBuilders, max_len: int, path: Path) -> None:
    """Sorted probabilities of the models, the mean over test histories."""

    def compute() -> dict[str, list[float]]:
        loader = cache.data.loader(split="test", max_len=max_len, limit=BATCH)
        return sorted_probabilities(models(), next(iter(loader)))

    plots.plot_sorted_probabilities(cache.json("figures", CURVES, compute), path)


def draw_plane(
    cache: ArtifactCache,
    members: ModelBuilders,
    others: ModelBuilders,
    score: Callable[[nn.Module], float],
    path: Path,
) -> None:
    """Validation NDCG@10 on the plane through three members, and where the others are."""
    plane = cache.json(
        "figures", PLANE, lambda: weight_plane(members(), others(), score, size=GRID_SIZE)
    )
    points = {name: (x, y) for name, (x, y) in plane["points"].items()}
    x, y, values = (np.array(plane[name]) for name in ("x", "y", "values"))
    plots.plot_plane(points, x, y, values, "validation NDCG@10", path)


def sorted_probabilities(models: Mapping[str, nn.Module], batch: Any) -> dict[str, list[float]]:
    """Label -> the 50 largest softmax probabilities, sorted falling, mean over the batch."""
    curves = {}
    for name, model in models.items():
        with torch.no_grad():
            p = model(batch).softmax(dim=1)
        curves[name] = p.topk(min(TOP, p.shape[1]), dim=1).values.mean(dim=0).tolist()
    return curves
