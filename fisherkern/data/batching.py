"""Batches cut from CSR sequences on the fly: left-padded histories and training windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherkern.checks import check_choice, check_count
from fisherkern.errors import InputError

Split = Literal["train", "validation", "test"]
Crop = Literal["random", "last", "all"]


def left_padded(
    items: NDArray[np.int32], start: NDArray[np.int64], stop: NDArray[np.int64], max_len: int
) -> NDArray[np.int64]:
    """Return the last `max_len` of items[start:stop], (N, max_len) int64, 0 on the left."""
    position = stop[:, None] - max_len + np.arange(max_len)
    inside = position >= start[:, None]
    return np.where(inside, items[np.maximum(position, 0)], 0).astype(np.int64)


def gather_ranges(start: NDArray[np.int64], stop: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions start[0]..stop[0]-1, start[1]..stop[1]-1, ..., joined, int64."""
    lengths = stop - start
    ends = np.cumsum(lengths)
    positions = np.arange(int(ends[-1]) if ends.size else 0)
    positions += np.repeat(start - (ends - lengths), lengths)
    return positions


@dataclass(frozen=True)
class HistoryBatches:
    """Histories and their next items; iterate as often as you like.

    Yields {"history": (N, T) int64, left-padded with 0, oldest first; "target": (N,)
    int64 in 1..V; "user": (N,) int64}. Allocates one batch at a time.
    """

    items: NDArray[np.int32]
    start: NDArray[np.int64]
    target: NDArray[np.int64]
    user: NDArray[np.int64]
    batch_size: int
    max_len: int

    def __len__(self) -> int:
        return -(-len(self.user) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        rows = self._rows(number)
        target = self.target[rows]
        history = left_padded(self.items, self.start[rows], target, self.max_len)
        return {
            "history": torch.from_numpy(history),
            "target": torch.from_numpy(self.items[target].astype(np.int64)),
            "user": torch.from_numpy(self.user[rows].copy()),
        }

    def lengths(self) -> list[int]:
        """How many items the histories of each batch hold."""
        every = np.minimum(self.target - self.start, self.max_len)
        return [int(every[self._rows(number)].sum()) for number in range(len(self))]

    def seen(
        self, rows: slice, last: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (pair from 0 of `rows`, item) of whole histories, or of their `last` places.

        Each item once, ascending for every pair.
        """
        start, stop = self.start[rows], self.target[rows]
        if last is not None:
            start = np.maximum(start, stop - last)
        pair = np.repeat(np.arange(len(start)), stop - start)
        # One sort of (pair, item) keys removes the repeats of all pairs at once.
        keys = np.unique(pair << 32 | self.items[gather_ranges(start, stop)])
        return keys >> 32, keys & 0xFFFFFFFF

    def _rows(self, number: int) -> slice:
        return slice(number * self.batch_size, (number + 1) * self.batch_size)


@dataclass(frozen=True)
class WindowBatches:
    """Windows items[start:stop] in a fixed order; iterate as often as you like.

    Yields (N, max_len) int64, left-padded with 0. Allocates one batch at a time.
    """

    items: NDArray[np.int32]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    batch_size: int
    max_len: int

    def __len__(self) -> int:
        return -(-len(self.start) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, len(self.start), self.batch_size):
            rows = slice(first, first + self.batch_size)
            window = left_padded(self.items, self.start[rows], self.stop[rows], self.max_len)
            yield torch.from_numpy(window)


def history_batches(
    items: NDArray[np.int32],
    offsets: NDArray[np.int64],
    users: NDArray[np.int64],
    target: NDArray[np.int64],
    *,
    split: str,
    batch_size: int,
    max_len: int,
    limit: int | None,
) -> HistoryBatches:
    """See `SequenceDataset.loader`."""
    check_count("batch_size", batch_size)
    check_count("max_len", max_len)
    if not users.size:
        raise InputError(f"no user has a history and a target in the {split} split")
    if limit is not None:
        check_count("limit", limit)
        # Evenly spread: the first users of a file are often its oldest or most active.
        keep = evenly_spread(users.size, limit)
        users, target = users[keep], target[keep]
    return HistoryBatches(items, offsets[users], target, users, batch_size, max_len)


def window_batches(
    items: NDArray[np.int32],
    begin: NDArray[np.int64],
    end: NDArray[np.int64],
    *,
    batch_size: int,
    max_len: int,
    seed: int,
    epoch: int,
    crop: str,
) -> WindowBatches:
    """See `SequenceDataset.windows`."""
    check_count("batch_size", batch_size)
    check_count("max_len", max_len)
    check_count("seed", seed, least=0)
    check_count("epoch", epoch, least=0)
    check_choice("crop", crop, get_args(Crop))
    long_enough = end > begin
    begin, end = begin[long_enough], end[long_enough]
    if not begin.size:
        raise InputError("no user has an item left to train on beside those held out")
    random = np.random.default_rng([seed, epoch])
    if crop == "random":
        # The draw comes before the shuffle, so that a user's window does not depend on it.
        stop = end - random.integers(0, np.maximum(end - begin - max_len, 0), endpoint=True)
    elif crop == "last":
        stop = end
    else:
        pieces = -(-(end - begin) // max_len)
        index = gather_ranges(np.zeros_like(pieces), pieces)
        begin = np.repeat(begin, pieces)
        stop = np.repeat(end, pieces) - index * max_len
    order = random.permutation(len(stop))
    start = np.maximum(begin, stop - max_len)
    return WindowBatches(items, start[order], stop[order], batch_size, max_len)


def evenly_spread(total: int, count: int) -> NDArray[np.int64]:
    """(min(count, total),) int64: numbers from 0 to total - 1, rising."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)
