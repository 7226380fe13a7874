"""What is held out of every user's sequence: leave-one-out, or all after a moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fisherkern.checks import check_choice, check_unit
from fisherkern.data.batching import Split, gather_ranges
from fisherkern.errors import InputError

Targets = Literal["last", "successive"]
ValidatedBy = Literal["time", "last-item"]


@dataclass(frozen=True, eq=False)
class Holdout:
    """Every user's sequence in three: what trains, what validates, what tests.

    Args:
        name: of the split, for the protocol.
        train: (num_users,) int64; a user's first train[u] actions train.
        validated: (num_users,) int64; those from train[u] to validated[u] validate, the rest
            test.
        every: whether every action held out is a target, or the last of its part alone.
    """

    name: str
    train: NDArray[np.int64]
    validated: NDArray[np.int64]
    every: bool = False

    def __post_init__(self) -> None:
        """Keep copies that nobody can change."""
        for name in ("train", "validated"):
            own = np.array(getattr(self, name), np.int64)
            own.flags.writeable = False
            object.__setattr__(self, name, own)

    def check(self, offsets: NDArray[np.int64]) -> Holdout:
        """Raise InputError unless the parts are those of sequences with these offsets."""
        train, validated, lengths = self.train, self.validated, np.diff(offsets)
        shaped = train.shape == validated.shape == lengths.shape
        if not shaped or not ((train >= 0) & (train <= validated) & (validated <= lengths)).all():
            raise InputError(
                f"holdout must have 0 <= train <= validated <= actions for each of {len(lengths)} "
                "users"
            )
        return self

    def content(self) -> bytes:
        """Return all of it, for a hash."""
        parts = (array.astype("<i8").tobytes() for array in (self.train, self.validated))
        return f"{self.name} {self.every}".encode() + b"".join(parts)

    def subset(self, users: NDArray[np.int64]) -> Holdout:
        """Return that of some users."""
        return Holdout(self.name, self.train[users], self.validated[users], self.every)

    def targets(
        self, offsets: NDArray[np.int64], split: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the user of every target, ascending, and the target's position in the items.

        Targets without an action before them are left out.
        """
        check_choice("split", split, get_args(Split))
        begin = offsets[:-1]
        if split == "train":
            first, stop = self.train - 1, self.train
        elif split == "validation":
            first, stop = self.train, self.validated
        else:
            first, stop = self.validated, np.diff(offsets)
        if not self.every:
            first = np.maximum(first, stop - 1)
        first = np.maximum(first, 1)
        stop = np.maximum(stop, first)
        users = np.repeat(np.arange(len(begin)), stop - first)
        return users, gather_ranges(begin + first, begin + stop)


def leave_one_out(offsets: NDArray[np.int64]) -> Holdout:
    """Hold out the last action of every user to test, and the one before to validate."""
    lengths = np.diff(offsets)
    return Holdout("leave-one-out", np.maximum(lengths - 2, 0), np.maximum(lengths - 1, 0))


def after_quantile(
    times: NDArray[Any], offsets: NDArray[np.int64], quantile: float, targets: str, validation: str
) -> Holdout:
    """Hold out what is later than a quantile of all times; see `SequenceDataset.split_by_time`."""
    check_unit("quantile", quantile, "(0, 1)")
    check_choice("targets", targets, get_args(Targets))
    check_choice("validation", validation, get_args(ValidatedBy))
    cut = np.quantile(times, quantile, method="lower")
    validated = _counts(times <= cut, offsets)
    if validated.sum() == len(times):
        raise InputError(f"quantile: no action is later than the quantile {quantile} of the times")
    if validation == "time":
        before = np.quantile(times[times <= cut], quantile, method="lower")
        train = _counts(times <= before, offsets)
    else:
        train = np.maximum(validated - 1, 0)
    name = f"global time split at quantile {quantile:g}, {targets} targets, validation by "
    return Holdout(name + validation.replace("-", " "), train, validated, targets == "successive")


def _counts(chosen: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """(num_users,): how many of each user's actions are chosen."""
    return np.diff(np.concatenate([[0], np.cumsum(chosen)])[offsets])
