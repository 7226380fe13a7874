"""The (user, item, time) rows of a file, and how they become sequences."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from fisherkern.data.dataset import SequenceDataset
from fisherkern.documents import MAX_JSON, read_bytes
from fisherkern.errors import InputError, shown
from fisherkern.files import is_file, read_json


@dataclass
class Actions:
    """The rows of one file, in file order.

    users and items are (num_actions,) codes into user_ids and item_ids; times are (num_actions,)
    numbers, or None where the file is in time order; lines are the rows' line numbers
    from 1 (row numbers for parquet, `unit` says which).
    """

    users: NDArray[Any]
    items: NDArray[Any]
    times: NDArray[Any] | None
    lines: NDArray[Any]
    user_ids: list[str]
    item_ids: list[str]
    unit: str = "line"

    def location(self, row: int) -> str:
        """Where row number `row` stands, to follow the path in a message: ":12"."""
        line = int(self.lines[row])
        return f":{line}" if self.unit == "line" else f": {self.unit} {line}"


def open_binary(path: Path) -> BinaryIO:
    """Open the file's bytes, unpacked where its first two say that it is a gzip file."""
    with path.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path)) if packed else path.open("rb")


def base_path(path: Path) -> Path:
    """Return the path without .gz, which gives a file its format, name and attributes."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def number_ids(values: NDArray[Any], *, by_appearance: bool) -> tuple[NDArray[np.int32], list[str]]:
    """Give integer ids codes 0.., in numerical order or in order of first appearance.

    Where they are few against their number, by tables of their range in place of a sort.
    """
    count = len(values)
    if count and values.min() >= 0 and values.max() < 4 * count:
        values = values.astype(np.int64, copy=False)
        first = np.full(int(values.max()) + 1, count)
        first[values[::-1]] = np.arange(count)[::-1]  # of equal ids the first row is written last
        distinct = np.flatnonzero(first < count)
        if by_appearance:
            distinct = distinct[np.argsort(first[distinct])]
        rank = np.empty(len(first), np.int32)
        rank[distinct] = np.arange(len(distinct), dtype=np.int32)
        codes = rank[values]
    elif not by_appearance:
        distinct, codes = np.unique(values, return_inverse=True)
    else:
        distinct, first, codes = np.unique(values, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        distinct, codes = distinct[order], rank[codes]
    return codes.astype(np.int32, copy=False), [str(value) for value in distinct.tolist()]


def assemble(
    actions: Actions, path: Path, *, name: str, min_actions: int, drop_short: bool
) -> SequenceDataset:
    """Sort by user and time (stable), drop or refuse short users, add the attributes."""
    if not len(actions.users):
        raise InputError(f"{path}:1: the file holds no interactions")
    if actions.times is not None and not np.isfinite(actions.times).all():
        row = int(np.argmin(np.isfinite(actions.times)))
        raise InputError(f"{path}{actions.location(row)}: the time is not a finite number")
    users, items, times = actions.users, actions.items, actions.times
    user_ids, item_ids = actions.user_ids, actions.item_ids
    counts = np.bincount(users, minlength=len(user_ids))
    if counts.min() < min_actions:
        if not drop_short:
            raise InputError(_short_user(actions, path, counts, min_actions))
        kept = counts >= min_actions
        rows = kept[users]
        if not rows.any():
            raise InputError(f"{path}: no user has {min_actions} actions or more")
        users, user_ids = _renumber(users[rows], user_ids)
        # Items that only the dropped users had are left out of the catalogue too.
        items, item_ids = _renumber(items[rows], item_ids)
        times = None if times is None else times[rows]
        counts = counts[kept]
    if times is not None:
        order = np.lexsort((times, users))
        items, times = items[order], times[order]
    elif (np.diff(users) < 0).any():
        items = items[np.argsort(users, kind="stable")]
    return SequenceDataset(
        name,
        items + np.int32(1),
        np.concatenate([[0], np.cumsum(counts)]),
        item_ids,
        user_ids,
        read_attributes(base_path(path).with_suffix(".attributes.json"), frozenset(item_ids)),
        times,
    )


def read_attributes(path: Path, items: frozenset[str]) -> dict[str, list[int]] | None:
    """Read item -> attribute numbers, {"12": [3, 7]}; None when there is no such file.

    Items outside `items` are checked like the others and then left out. Raises
    InputError naming the file, and the line of a syntax error or the item.
    """
    if not is_file(path):
        return None
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path}:1: must be an object from item to list of attribute numbers")
    for item, values in content.items():
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise InputError(
                f"{path}:{_line_of_key(path, item)}: the attributes of item {shown(item)} "
                "must be a list of integers"
            )
    return {item: values for item, values in content.items() if item in items}


def _line_of_key(path: Path, key: str) -> int:
    text = read_bytes(path, MAX_JSON).decode("utf-8")
    return text.count("\n", 0, max(text.find(f'"{key}"'), 0)) + 1


def _renumber(codes: NDArray[Any], ids: list[str]) -> tuple[NDArray[np.int32], list[str]]:
    """Codes over the ids that still occur, in the same order."""
    distinct, codes = np.unique(codes, return_inverse=True)
    return codes.astype(np.int32), [ids[code] for code in distinct.tolist()]


def _short_user(actions: Actions, path: Path, counts: NDArray[np.int64], min_actions: int) -> str:
    row = int(np.argmax(counts[actions.users] < min_actions))
    user = int(actions.users[row])
    number = int(counts[user])
    return (
        f"{path}{actions.location(row)}: user {actions.user_ids[user]} has only {number} "
        f"action{'s' if number > 1 else ''} and {min_actions} are needed; "
        f"drop_short=True (--drop-short) leaves out the {int((counts < min_actions).sum())} "
        "such users"
    )
