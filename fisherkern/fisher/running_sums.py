"""Sums of many batches: added to in fp32, kept in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fisherkern.processes import joined_sum, world

# Entries of a tensor that are moved into float64 after every batch, which takes a few ms; after
# every second one of a tensor twice as large. Beyond the most its sum stays in fp32, as twice the
# memory of a table of millions of items may not be there.
_EVERY_BATCH, _MOST = 2**20, 2**26
# Entries converted at once on a CPU, which stay in cache: measured four times as fast.
_CACHED = 2**15

# Entries made float64 at once.
_WIDENED = 2**24


class RunningSums:
    """Flat sums by parameter name.

    `recent` is what kernels add to, fp32 or wider, and holds few batches: were it all of them, a
    batch would be rounded to the units of the whole sum, and the order of the batches would show.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.recent = {
            name: torch.zeros(
                p.numel(), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device
            )
            for name, p in parameters.items()
        }
        self._kept = {
            name: torch.zeros_like(own, dtype=torch.float64)
            for name, own in self.recent.items()
            if own.dtype == torch.float32 and len(own) <= _MOST
        }
        self._moved: set[str] = set()
        self._batches = 0

    def end_batch(self) -> None:
        """Move what is due into float64."""
        self._batches += 1
        for name, kept in self._kept.items():
            if self._batches % max(1, -(-len(kept) // _EVERY_BATCH)) == 0:  # a shard may be empty
                self._move(name)

    def _move(self, name: str) -> None:
        if name not in self._kept:
            return
        kept, recent = self._kept[name], self.recent[name]
        size = _CACHED if kept.device.type == "cpu" else max(1, len(kept))
        for to, own in zip(kept.split(size), recent.split(size), strict=True):
            to += own.double()
        recent.zero_()
        self._moved.add(name)

    def total(self, name: str) -> Tensor:
        """Return the sum of everything, float64 where any of it is kept so."""
        if name not in self._moved:
            return self.recent[name]
        self._move(name)
        return self._kept[name]

    def join(self) -> None:
        """Add up what several processes have, in their order; all have the sums afterwards."""
        if world() == 1:
            return
        for name in self.recent:
            self._move(name)
            total = self.total(name)
            total.copy_(joined_sum(total))


def float64_sum(values: Tensor) -> Tensor:
    """Return the float64 sum of a flat tensor, of which a part at a time is widened."""
    return torch.stack([part.double().sum() for part in values.split(_WIDENED)]).sum()


def mean_of(total: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return the mean of a sum of squares, in place where the type allows, as tables may be large.

    Rounding and a sketch's noise can take a sum below zero; a mean is 0 there.
    """
    return total.div_(count).clamp_(min=0).to(dtype)
