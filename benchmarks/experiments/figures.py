"""The figures of the Fisher paper, of any models: numbers first, stored, then PNG files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.experiments.artifacts import ArtifactCache, OutOfTime
from benchmarks.experiments.fisher_cost import cost_table, fisher_cost
from fisherkern import plots
from fisherkern.encoders import SequenceEncoder
from fisherkern.files import atomic_path

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
    plane = cache.json("figures", PLANE, lambda: weight_plane(members(), others(), score))
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


def weight_plane(
    members: Mapping[str, nn.Module],
    others: Mapping[str, nn.Module],
    score: Callable[[nn.Module], float],
) -> dict[str, Any]:
    """Coordinates of the models, and `score` on a grid, in the plane of three members.

    The axes are orthonormal, with the first member at the origin and the second on the first
    axis. A model off the plane is shown at its projection. Returns JSON values:
    points {name: [x, y]}, x and y (GRID_SIZE,), values (GRID_SIZE, GRID_SIZE) by row of y.
    """
    start, middle, last = members.values()
    origin = _flat(start)
    first = _flat(middle) - origin
    first /= first.norm()
    second = _flat(last) - origin
    second -= (second @ first) * first
    second /= second.norm()
    points = {}
    for name, model in {**members, **others}.items():
        offset = _flat(model) - origin
        points[name] = [float(offset @ first), float(offset @ second)]
    low, high = np.array(list(points.values())).min(0), np.array(list(points.values())).max(0)
    margin = 0.25 * (high - low).max()
    x, y = (np.linspace(low[i] - margin, high[i] + margin, GRID_SIZE) for i in (0, 1))
    probe = copy.deepcopy(start)
    values = []
    for v in y:
        row = []
        for u in x:
            vector = origin + float(u) * first + float(v) * second
            nn.utils.vector_to_parameters(vector.float(), probe.parameters())
            row.append(score(probe))
        values.append(row)
    return {"points": points, "x": x.tolist(), "y": y.tolist(), "values": values}


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])
