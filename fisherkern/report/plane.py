"""The plane through three members' weights: scores on it, and where posteriors lie."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from fisherkern.errors import InputError
from fisherkern.fisher import DiagFisher

SAMPLES = 40  # of each posterior
# Of a tensor's mean Fisher, added to each entry: where F is 0 a posterior would have no end.
FLOOR = 0.1


def weight_plane(
    members: Mapping[str, nn.Module],
    others: Mapping[str, nn.Module],
    score: Callable[[nn.Module], float],
    *,
    fishers: Mapping[str, DiagFisher] | None = None,
    size: int = 9,
) -> dict[str, Any]:
    """Compute where models are in the plane of three members, and `score` on a grid of it.

    The axes are orthonormal, with the first member at the origin and the second on the first
    axis. A model off the plane is shown at its projection. A posterior is the normal distribution
    N(theta_m, (n (F + 0.1 mean F))^-1), n the Fisher's sequences and the mean that of a tensor;
    its projection has the covariance B^T (...)^-1 B, B the axes.

    Args:
        members: three models by name, of the same parameters.
        others: more of them.
        score: maps a model to a number.
        fishers: members' Fishers by name; one of no known number of sequences is left out.
        size: points along each side.

    Returns:
        JSON values: points {name: [x, y]}, x and y (size,), values (size, size) by row of y,
        samples {name: (40, 2)} of the posteriors.

    Raises:
        InputError: other than three members, models of other shapes, or members on one line.
    """
    if len(members) != 3:
        raise InputError(f"a plane goes through three members, got {len(members)}")
    start, middle, last = members.values()
    shapes = {name: parameter.shape for name, parameter in start.named_parameters()}
    for name, model in {**members, **others}.items():
        if {key: value.shape for key, value in model.named_parameters()} != shapes:
            raise InputError(f"model {name} has other parameters than the first member")
    origin = _flat(start)
    first = _flat(middle) - origin
    second = _flat(last) - origin
    lengths = float(first.norm()), float(second.norm())
    first /= max(lengths[0], torch.finfo(torch.float64).tiny)
    second -= (second @ first) * first
    if not (lengths[0] > 0 and float(second.norm()) > 1e-6 * lengths[1]):
        raise InputError("the three members are on one line")
    second /= second.norm()
    axes = torch.stack([first, second], dim=1)
    points = {
        name: ((_flat(m) - origin) @ axes).tolist() for name, m in {**members, **others}.items()
    }
    samples = {
        name: _samples(fisher, start, axes, points[name])
        for name, fisher in (fishers or {}).items()
        if fisher.meta.get("num_sequences")
    }
    low, high = np.array(list(points.values())).min(0), np.array(list(points.values())).max(0)
    margin = 0.25 * (high - low).max()
    x, y = (np.linspace(low[i] - margin, high[i] + margin, size) for i in (0, 1))
    probe = copy.deepcopy(start)
    values = []
    for v in y:
        row = []
        for u in x:
            vector = origin + float(u) * first + float(v) * second
            vector_to_parameters(vector.to(next(probe.parameters())), probe.parameters())
            row.append(score(probe))
        values.append(row)
    return {
        "points": points,
        "x": x.tolist(),
        "y": y.tolist(),
        "values": values,
        "samples": samples,
    }


def _samples(
    fisher: DiagFisher, model: nn.Module, axes: Tensor, at: list[float]
) -> list[list[float]]:
    """Draw from a posterior's projection, (SAMPLES, 2)."""
    parts = []
    for name, parameter in model.named_parameters():
        known = fisher.get(name)
        own = torch.zeros_like(parameter) if known is None else known
        own = own.detach().double().flatten()
        parts.append(own + FLOOR * own.mean())
    precision = fisher.meta["num_sequences"] * torch.cat(parts)
    # Where a tensor has no Fisher at all, nothing is known; it is held where it is.
    variance = torch.where(precision > 0, 1 / precision.clamp(min=1e-300), 0.0)
    covariance = axes.T @ (variance[:, None] * axes)
    random = np.random.default_rng(0)
    drawn = random.multivariate_normal(np.array(at), covariance.numpy(), SAMPLES)
    return [[float(x), float(y)] for x, y in drawn]


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten().cpu() for p in model.parameters()])
