"""Sequences of items in CSR form, and the split over them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fisherkern.checks import check_count
from fisherkern.data.batching import (
    HistoryBatches,
    WindowBatches,
    gather_ranges,
    history_batches,
    window_batches,
)
from fisherkern.data.holdout import Holdout, after_quantile, leave_one_out
from fisherkern.errors import InputError, shown
from fisherkern.fingerprint import ItemIdsHash


class SequenceDataset:
    """Every user's items, oldest first, stored once; nothing is ever expanded to prefixes.

    All attributes are immutable.

    Args:
        name: what the data are called, for tables and file names.
        items: (num_actions,) int32, internal ids 1..V, one user after another. 0 is padding.
        offsets: (num_users + 1,) int64; user u owns items[offsets[u]:offsets[u+1]].
        item_ids: V external ids; internal id v is item_ids[v-1].
        user_ids: num_users external ids.
        attributes: external item id -> attribute numbers; None where there are none.
        times: (num_actions,) int64 or float64, each user's ascending; None where they are unknown.
        holdout: what trains, validates and tests; None: leave-one-out.

    Raises:
        InputError: arrays that do not fit together.
    """

    name: str
    items: NDArray[np.int32]
    offsets: NDArray[np.int64]
    item_ids: tuple[str, ...]
    user_ids: tuple[str, ...]
    attributes: dict[str, list[int]] | None
    times: NDArray[Any] | None
    holdout: Holdout

    def __init__(
        self,
        name: str,
        items: ArrayLike,
        offsets: ArrayLike,
        item_ids: Sequence[str],
        user_ids: Sequence[str],
        attributes: Mapping[str, Sequence[int]] | None = None,
        times: ArrayLike | None = None,
        holdout: Holdout | None = None,
    ) -> None:
        item_array = _frozen(items, np.int32, "items")
        offset_array = _frozen(offsets, np.int64, "offsets")
        if len(offset_array) != len(user_ids) + 1 or offset_array[0] != 0:
            raise InputError(
                f"offsets must be 0 and then one end for each of {len(user_ids)} users"
            )
        if (np.diff(offset_array) < 0).any() or offset_array[-1] != len(item_array):
            raise InputError(f"offsets must not fall and must end at {len(item_array)} actions")
        if item_array.size and not 1 <= item_array.min() <= item_array.max() <= len(item_ids):
            raise InputError(
                f"items must lie in 1..{len(item_ids)}, "
                f"but go from {item_array.min()} to {item_array.max()}"
            )
        known = frozenset(item_ids)
        if len(known) != len(item_ids):
            raise InputError("item_ids names an item twice")
        if attributes is not None:
            unknown = next((item for item in attributes if item not in known), None)
            if unknown is not None:
                raise InputError(
                    f"attributes names item {shown(unknown)}, which is not in item_ids"
                )
            attributes = {item: list(values) for item, values in attributes.items()}
        values = {
            "name": name,
            "items": item_array,
            "offsets": offset_array,
            "item_ids": tuple(item_ids),
            "user_ids": tuple(user_ids),
            "attributes": attributes,
            "times": None if times is None else _frozen_times(times, offset_array),
            "holdout": (holdout or leave_one_out(offset_array)).check(offset_array),
        }
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a SequenceDataset is immutable: {name} cannot be set")

    def __repr__(self) -> str:
        return (
            f"SequenceDataset({self.name!r}: {self.num_users:,} users, "
            f"{self.num_items:,} items, {self.num_actions:,} actions)"
        )

    @property
    def num_users(self) -> int:
        """How many sequences there are."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """V, the size of the catalogue."""
        return len(self.item_ids)

    @property
    def num_actions(self) -> int:
        """How many (user, item) pairs there are, repeated ones counted again."""
        return len(self.items)

    def sequence(self, user: int) -> NDArray[np.int32]:
        """All items of user number `user` in 0..num_users-1, oldest first: a read-only view."""
        self._check_users(np.asarray([user]))
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def subset(self, users: ArrayLike) -> SequenceDataset:
        """Return the same catalogue with only these users, (n,) integers, in the order given."""
        rows = self._check_users(users)
        start, stop = self.offsets[rows], self.offsets[rows + 1]
        places = gather_ranges(start, stop)
        return SequenceDataset(
            self.name,
            self.items[places],
            np.concatenate([[0], np.cumsum(stop - start)]),
            self.item_ids,
            [self.user_ids[row] for row in rows.tolist()],
            self.attributes,
            None if self.times is None else self.times[places],
            self.holdout.subset(rows),
        )

    def split_by_time(
        self, quantile: float = 0.9, *, targets: str = "last", validation: str = "time"
    ) -> SequenceDataset:
        """Return the same sequences with all held out that is later than a quantile of time.

        One moment for all users, so that nothing is learnt from after a test. The moment is the
        time at `quantile` of all actions. What is later tests: a user's last action, or every one
        of them, each after all of the user's actions before. What is not later trains and
        validates. Users who come later than the moment are tested too, from their second action
        on. Items that nobody had before the moment stay in the catalogue.

        Args:
            quantile: in (0, 1).
            targets: "last" or "successive" (every later action).
            validation: "time": what is later than the `quantile` of the times that are left;
                "last-item": each user's last action of those that are left.

        Returns:
            The data set, whose loaders, windows and popularity are of this split.

        Raises:
            InputError: data without times, a bad argument, or no later action.

        Source:
            Gusak et al., Time to Split: Exploring Data Splitting Strategies for Offline Evaluation
            of Sequential Recommenders, RecSys 2025.
        """
        if self.times is None:
            raise InputError(f"{self.name}: its actions have no times to split by")
        holdout = after_quantile(self.times, self.offsets, quantile, targets, validation)
        return SequenceDataset(
            self.name,
            self.items,
            self.offsets,
            self.item_ids,
            self.user_ids,
            self.attributes,
            self.times,
            holdout,
        )

    def with_items(self, item_ids: Sequence[str]) -> SequenceDataset:
        """Return the same sequences over another catalogue that holds theirs.

        `item_ids` are its items by internal id.

        For evaluating a model whose catalogue is a union of several. Raises InputError
        naming an item that the other catalogue lacks.
        """
        internal = {item: v for v, item in enumerate(item_ids, start=1)}
        missing = [item for item in self.item_ids if item not in internal]
        if missing:
            raise InputError(
                f"{self.name}: item {shown(missing[0])} and {len(missing) - 1} more are not in the"
                f" other catalogue of {len(internal)}"
            )
        table = np.array([0, *(internal[item] for item in self.item_ids)])
        return SequenceDataset(
            self.name,
            table[self.items],
            self.offsets,
            list(item_ids),
            self.user_ids,
            self.attributes,
            self.times,
            self.holdout,
        )

    @property
    def train_ends(self) -> NDArray[np.int64]:
        """(num_users,) int64: the position in `items` where each user's training part ends."""
        return self.offsets[:-1] + self.holdout.train

    def targets(self, split: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the user of every target of a split, and the target's position in `items`."""
        return self.holdout.targets(self.offsets, split)

    def popularity(self) -> NDArray[np.int64]:
        """(V,) int64: how often item v occurs (at v-1) in the training part of all users."""
        train = self.items[gather_ranges(self.offsets[:-1], self.train_ends)]
        return np.bincount(train, minlength=self.num_items + 1)[1:].astype(np.int64)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over items, offsets, item_ids and a split other than leave-one-out.

        Equal for equal content, from whatever source.
        """
        digest = hashlib.sha256()
        for array in (self.items.astype("<i4"), self.offsets.astype("<i8")):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(array.tobytes())
        ids = ItemIdsHash(digest)
        ids.update(self.item_ids)
        split = self.holdout.content()
        if split != leave_one_out(self.offsets).content():
            digest.update(split)
        return ids.hexdigest()

    def loader(
        self,
        *,
        split: str = "train",
        batch_size: int = 256,
        max_len: int = 50,
        limit: int | None = None,
        users: ArrayLike | None = None,
    ) -> HistoryBatches:
        """Give one (history, next item) pair per user: what to compute a Fisher or a metric on.

        For seq = s_1..s_n the pair is s_1..s_{n-3} -> s_{n-2} ("train"), s_1..s_{n-2} -> s_{n-1}
        ("validation") or s_1..s_{n-1} -> s_n ("test"). Users whose history would be empty are left
        out. After `split_by_time` the pairs are those of its targets, of which a user may have
        several or none; "train" is then the last item that trains.

        Args:
            split: "train", "validation" or "test".
            batch_size: pairs in a batch.
            max_len: items of a history, its last ones.
            limit: so many pairs, evenly spread over all of them; None: all.
            users: (n,) integers, those whose pairs are given, in this order; None: all.

        Returns:
            A re-iterable with len() that yields {"history": (N, max_len) int64 torch tensor,
            left-padded with 0; "target": (N,) int64; "user": (N,) int64, the index in
            this dataset}.

        Raises:
            InputError: a bad argument, or no user that has a pair.
        """
        user, target = self.targets(split)
        if users is not None:
            rows = self._check_users(users)
            bounds = np.searchsorted(user, [rows, rows + 1])
            kept = gather_ranges(bounds[0], bounds[1])
            user, target = user[kept], target[kept]
        return history_batches(
            self.items,
            self.offsets,
            user,
            target,
            split=split,
            batch_size=batch_size,
            max_len=max_len,
            limit=limit,
        )

    def windows(
        self, *, batch_size: int, max_len: int, seed: int, epoch: int, crop: str = "random"
    ) -> WindowBatches:
        """Cut the training material of one epoch from the training part of every user.

        For seq = s_1..s_n that is s_1..s_{n-2}, after `split_by_time` what trains.

        Args:
            batch_size: windows in a batch.
            max_len: items of a window.
            seed: with `epoch` it fixes the windows and their order.
            epoch: the same (seed, epoch) gives the same batches.
            crop: "random": one uniformly drawn window of `max_len` consecutive items per user (all
                items when there are fewer); "last": the last `max_len`; "all": windows that do not
                overlap and cover everything, counted from the end.

        Returns:
            A re-iterable with len() that yields (N, max_len) int64 torch tensors, left-padded
            with 0.

        Raises:
            InputError: a bad argument, or nothing left to train on.
        """
        return window_batches(
            self.items,
            self.offsets[:-1],
            self.train_ends,
            batch_size=batch_size,
            max_len=max_len,
            seed=seed,
            epoch=epoch,
            crop=crop,
        )

    def first_windows(
        self, count: int, *, batch_size: int, max_len: int, seed: int
    ) -> list[torch.Tensor]:
        """Return the first `count` batches of random `windows`, of as many epochs as that takes."""
        check_count("count", count)
        epochs = (
            self.windows(batch_size=batch_size, max_len=max_len, seed=seed, epoch=epoch)
            for epoch in itertools.count(1)
        )
        return list(itertools.islice(itertools.chain.from_iterable(epochs), count))

    def _check_users(self, users: ArrayLike) -> NDArray[np.int64]:
        rows = np.asarray(users)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise InputError(f"users must be a list of integers, not {rows.dtype} {rows.shape}")
        outside = rows[(rows < 0) | (rows >= self.num_users)]
        if outside.size:
            raise InputError(f"user {outside[0]} is not in 0..{self.num_users - 1}")
        return rows.astype(np.int64)


def _frozen(values: ArrayLike, dtype: type[np.generic], name: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"{name} must be one-dimensional integers, not {array.dtype}")
    if array.dtype == dtype and not array.flags.writeable:
        return array
    cast = array.astype(dtype)
    if (cast != array).any():
        raise InputError(f"{name} holds a value too large for {np.dtype(dtype)}")
    cast.flags.writeable = False
    return cast


def _frozen_times(values: ArrayLike, offsets: NDArray[np.int64]) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (int(offsets[-1]),) or array.dtype.kind not in "iuf":
        raise InputError(f"times must be {offsets[-1]} numbers, not {array.dtype} {array.shape}")
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise InputError("times holds a value too large for int64")
    cast = array.astype(np.float64 if array.dtype.kind == "f" else np.int64, copy=False)
    if not np.isfinite(cast).all():
        raise InputError("times holds a value that is not finite")
    falls = cast[1:] < cast[:-1]
    falls[offsets[(offsets > 0) & (offsets < len(cast))] - 1] = False  # from a user to the next
    if falls.any():
        raise InputError(f"times fall at action {int(falls.argmax()) + 1} of the same user")
    if cast.flags.writeable:
        cast = cast.copy() if np.shares_memory(cast, array) else cast
        cast.flags.writeable = False
    return cast
