"""What the figures of the Fisher paper show, of any models, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fisherkern import plots

MOST = 50  # of the sorted probabilities


def sorted_probabilities(models: Mapping[str, nn.Module], batch: Any) -> dict[str, list[float]]:
    """Label -> the 50 largest softmax probabilities, sorted falling, mean over the batch."""
    curves = {}
    for name, model in models.items():
        with torch.no_grad():
            p = model(batch).softmax(dim=1)
        curves[name] = p.topk(min(MOST, p.shape[1]), dim=1).values.mean(dim=0).tolist()
    return curves


def draw_cost(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """`fisher_cost`'s rows; their provider is what tells the lines apart."""
    lines = [{**row, "sampler": row["provider"]} for row in rows]
    for line in lines:
        del line["provider"]
    plots.plot_fisher_cost(lines, path)


def draw_plane(plane: Mapping[str, Any], path: Path) -> None:
    """What `plane_of` found."""
    points = {name: (x, y) for name, (x, y) in plane["points"].items()}
    x, y, values = (np.array(plane[name]) for name in ("x", "y", "values"))
    plots.plot_plane(points, x, y, values, "validation NDCG@10", path)
