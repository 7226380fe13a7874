"""Ranges of RANGE items: what samplers know of the catalogue before they look at its items."""

from __future__ import annotations

import torch
from torch import Tensor

# Items of a range, of which samplers know the log-sum-exp; tiles are whole ranges.
RANGE = 256


def num_ranges(num_items: int) -> int:
    """Ranges that a catalogue has; the last one may be shorter."""
    return -(-num_items // RANGE)


def chosen_range(total: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The range each u (N, k) falls into and the mass below it; total (N, P): running sums."""
    part = torch.searchsorted(total, u, right=True).clamp_(max=total.shape[1] - 1)
    return part, torch.where(part > 0, total.gather(1, (part - 1).clamp_(min=0)), 0.0)
