"""Popularity as a model: the row that every other must beat."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fisherkern.checks import check_positive
from fisherkern.data import SequenceDataset
from fisherkern.data.batching import gather_ranges
from fisherkern.errors import InputError

_DAY = 86_400  # seconds
# Numbers of a second; since 1970 the times of 1973 to 2103 are told apart by their size.
_UNITS = (1, 10**3, 10**6, 10**9)


class Popularity(nn.Module):
    """Score every item by how many training actions it has, for all users alike.

    Args:
        data: the sequences; their training part is counted.
        days: count the last so many days of the training part alone; None: all of it. Needs
            times since 1970, in seconds, or in milli-, micro- or nanoseconds.

    Raises:
        InputError: `days` is not positive, or the data have no times or times of another kind.

    Examples:
        >>> import fisherkern as fk
        >>> data = fk.synthetic(num_users=50, num_items=30).split_by_time(0.9)
        >>> always, lately = fk.Popularity(data), fk.Popularity(data, days=7)
        >>> report = fk.evaluate(lately, data, k=10)
        >>> report.protocol.holdout
        'global time split at quantile 0.9, last targets, validation by time'
    """

    first_item = 1
    counts: Tensor

    def __init__(self, data: SequenceDataset, *, days: float | None = None) -> None:
        super().__init__()
        self.item_ids = list(data.item_ids)
        if days is None:
            counts = data.popularity()
        else:
            check_positive("days", days)
            if data.times is None:
                raise InputError(f"{data.name}: its actions have no times, which days={days} needs")
            train = gather_ranges(data.offsets[:-1], data.train_ends)
            times = data.times[train]
            if not len(times):
                raise InputError(f"{data.name}: no action trains")
            since = times.max() - days * _DAY * _ticks(times, data.name)
            recent = data.items[train[times > since]]
            counts = np.bincount(recent, minlength=data.num_items + 1)[1:]
        # fp32 would take counts above 2^24 for ties.
        self.register_buffer("counts", torch.from_numpy(counts.astype(np.float64)))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the counts for every row of the batch, (N, V) float64."""
        return self.counts.expand(len(batch["history"]), -1)


def _ticks(times: np.ndarray, name: str) -> int:
    """Return how many of the times' units are a second."""
    for unit in _UNITS:
        if 10**8 * unit <= times.min() and times.max() < 42 * 10**8 * unit:
            return unit
    raise InputError(
        f"{name}: its times, {times.min()} to {times.max()}, are not seconds since 1970 nor "
        "milli-, micro- or nanoseconds, which days= needs"
    )
