"""The members' weights found on a validation score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fisherkern.merging.scores import finite_score

GRID = 20
REFINEMENTS = (0.2, 0.1, 0.05)


def _starting_points(members: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Points of the simplex that do not depend on any score, most even first."""
    vertices = np.eye(members)
    if members == 2:
        # By distance from the middle, so that among equal scores the most even mix wins.
        for step in sorted(range(GRID + 1), key=lambda step: abs(2 * step - GRID)):
            yield np.array([GRID - step, step]) / GRID
        return
    yield np.full(members, 1 / members)
    yield from vertices
    if members == 1:
        return
    for a in range(members):
        for b in range(a + 1, members):
            yield (vertices[a] + vertices[b]) / 2
    yield from np.random.default_rng(seed).dirichlet(np.ones(members), size=steps)


def greedy_weights(
    score: Callable[[list[float]], float], members: int
) -> tuple[list[float], list[dict[str, Any]]]:
    """Return the greedy soup, equal weights of the members kept, and every candidate tried.

    Members are taken in the order of their own scores, the highest first and the earlier of equals;
    one is kept if the equal mix of those kept and it scores no lower than the mix without it. The
    result scores at least as well as the best member.

    Args:
        score: Maps lambda to a number, higher is better. Called 2 M - 1 times.
        members: M.

    Source: Wortsman et al., Model soups, arXiv 2203.05482, recipe 1.
    """
    candidates: list[dict[str, Any]] = []

    def attempt(kept: list[int]) -> float:
        weights = [1 / len(kept) if member in kept else 0.0 for member in range(members)]
        value = finite_score(score, weights, f"at weights {weights}")
        candidates.append({"weights": weights, "score": value})
        return value

    alone = [attempt([member]) for member in range(members)]
    order = sorted(range(members), key=lambda member: -alone[member])
    kept, best = [order[0]], alone[order[0]]
    for member in order[1:]:
        value = attempt([*kept, member])
        if value >= best:
            kept, best = [*kept, member], value
    return [1 / len(kept) if member in kept else 0.0 for member in range(members)], candidates


def search_weights(
    score: Callable[[list[float]], float], members: int, *, steps: int, seed: int
) -> tuple[list[float], list[dict[str, Any]]]:
    """Return the weights with the highest score, and every candidate tried.

    M = 2: the grid 0, 0.05, ..., 1. M > 2: the uniform point, every vertex, every edge's middle,
    `steps` draws from Dirichlet(1), then moves from the best point so far towards each vertex by
    0.2, 0.1 and 0.05. Every vertex is tried, so the best member alone is never beaten by what is
    returned unless the score says so. The first of equal scores wins.

    Args:
        score: Maps lambda to a number, higher is better.
        members: M.
        steps: Number of random draws.
        seed: Seed of the draws.
    """
    candidates: list[dict[str, Any]] = []
    best = np.zeros(members)
    best_score = -math.inf

    def attempt(point: np.ndarray) -> None:
        nonlocal best, best_score
        weights = [float(weight) for weight in point]
        value = finite_score(score, weights, f"at weights {weights}")
        candidates.append({"weights": weights, "score": value})
        if value > best_score or len(candidates) == 1:
            best, best_score = point, value

    for point in _starting_points(members, steps, seed):
        attempt(point)
    if members > 2:
        for move in REFINEMENTS:
            start = best
            for vertex in np.eye(members):
                attempt((1 - move) * start + move * vertex)
    return [float(weight) for weight in best], candidates
