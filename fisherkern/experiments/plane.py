"""Members and merges on the plane through three members; the paper's Figure 3."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GRID = 9  # points along each side


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def plane_of(
    members: Mapping[str, nn.Module],
    others: Mapping[str, nn.Module],
    score: Callable[[nn.Module], float],
) -> dict[str, Any]:
    """Coordinates of the models, and `score` on a grid, in the plane of three members.

    The axes are orthonormal, with the first member at the origin and the second on the first
    axis. A model off the plane is shown at its projection. Returns JSON values:
    points {name: [x, y]}, x and y (GRID,), values (GRID, GRID) by row of y.
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
    x, y = (np.linspace(low[i] - margin, high[i] + margin, GRID) for i in (0, 1))
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
