"""Layers of a network, and how much information their weights carry (PCRec)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def over_layers(names: Iterable[str], matrices: Mapping[str, T], default: T) -> dict[str, T]:
    """Give every tensor the value of its layer.

    A layer is a tensor of two dimensions or more and the vectors (biases, norms) after it, up to
    the next one. Vectors before the first matrix go with it.

    Args:
        names: Every tensor, in the model's order.
        matrices: A value for each tensor of two dimensions or more, in the same order.
        default: The value where there is no matrix.
    """
    current = next(iter(matrices.values()), default)
    values = {}
    for name in names:
        current = matrices.get(name, current)
        values[name] = current
    return values


def histogram(values: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Count `values` (n,) float64 in `bins` bins of equal width between `low` and `high`.

    Returns:
        (bins,) int64. The last bin holds the values that equal `high`.
    """
    width = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    index = ((values - low) / width * bins).long().clamp(max=bins - 1)
    return torch.bincount(index.flatten(), minlength=bins)


def entropy(counts: Tensor) -> Tensor:
    """Return -sum_b p_b log p_b in nats, float64, of counts (.., bins); 0 where all are 0."""
    p = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return -torch.xlogy(p, p).sum(-1)
