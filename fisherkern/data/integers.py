"""Vectorised reading of text whose columns are integers: `user item` lines and ratings.dat.

A few bytes of work per character in numpy instead of a Python loop per line, block by
block, so that ten million lines take seconds and every error still has its line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fisherkern.data.actions import Actions, number_ids, open_binary
from fisherkern.errors import InputError, shown

BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 22
_MOST_DIGITS = 18  # what always fits in int64
_NEWLINE, _RETURN, _SPACE, _COLON, _ZERO = (ord(character) for character in "\n\r :0")


@dataclass(frozen=True)
class LineLayout:
    """Columns of a line: their names, which of them are read, and whether "::" separates them."""

    columns: tuple[str, ...]
    wanted: tuple[int, ...]
    colons: bool


_SEQREC = LineLayout(("user", "item"), (0, 1), colons=False)
_MOVIELENS = LineLayout(("user", "item", "rating", "timestamp"), (0, 1, 3), colons=True)


def read_seqrec(path: Path) -> Actions:
    """`user item` lines, oldest first in every user; ids are numbered in numerical order."""
    values, lines = read_integers(path, _SEQREC)
    users, user_ids = number_ids(values[0], by_appearance=False)
    items, item_ids = number_ids(values[1], by_appearance=False)
    return Actions(users, items, None, lines, user_ids, item_ids)


def read_movielens(path: Path) -> Actions:
    """`user::item::rating::timestamp` lines; ids are numbered by first appearance."""
    values, lines = read_integers(path, _MOVIELENS)
    users, user_ids = number_ids(values[0], by_appearance=True)
    items, item_ids = number_ids(values[1], by_appearance=True)
    return Actions(users, items, values[2], lines, user_ids, item_ids)


def read_integers(
    path: Path, layout: LineLayout
) -> tuple[list[NDArray[np.int64]], NDArray[np.int32]]:
    """Read the wanted columns, each (num_lines,) int64, and the numbers of lines not blank.

    Raises InputError with file and line for a wrong number of columns or a value that
    is not an integer from 0 to 10^18 - 1.
    """
    blocks: list[list[NDArray[np.int64]]] = []
    numbers: list[NDArray[np.int32]] = []
    line = 1
    with open_binary(path) as stream:
        while block := stream.read(_BLOCK_BYTES):
            block += stream.readline()
            if line == 1:
                block = block.removeprefix(BOM)
            if not block.endswith(b"\n"):
                block += b"\n"
            values, filled = _parse_block(block, layout, path, line)
            blocks.append(values)
            numbers.append((filled + line).astype(np.int32))
            line += block.count(b"\n")
    if not blocks:
        return [np.empty(0, np.int64) for _ in layout.wanted], np.empty(0, np.int32)
    columns = [np.concatenate(column) for column in zip(*blocks, strict=True)]
    return columns, np.concatenate(numbers)


def _parse_block(
    block: bytes, layout: LineLayout, path: Path, line: int
) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """(wanted columns, indices of the lines that are not blank) of whole lines."""
    data = np.frombuffer(block, np.uint8)
    newlines = np.flatnonzero(data == _NEWLINE)
    if layout.colons:
        inside = (data != _COLON) & (data != _NEWLINE) & (data != _RETURN)
    else:
        inside = data > _SPACE
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    starts, stops = edges[::2], edges[1::2]
    counts = np.diff(np.searchsorted(starts, newlines), prepend=0)
    width = len(layout.columns)
    bad = (counts != width) & (counts != 0)
    if layout.colons:
        colons = np.diff(np.searchsorted(np.flatnonzero(data == _COLON), newlines), prepend=0)
        bad |= colons != np.where(counts == 0, 0, 2 * (width - 1))
    if not bad.any():
        filled = np.flatnonzero(counts)
        starts, stops = starts.reshape(-1, width), stops.reshape(-1, width)
        if layout.colons:
            # Six colons and four fields may still be "1:2:::3::4".
            bad[filled[(starts[:, 1:] - stops[:, :-1] != 2).any(axis=1)]] = True
    if bad.any():
        index = int(np.argmax(bad))
        text = block.split(b"\n", index + 1)[index].decode(errors="replace").strip("\r")
        form = ("::" if layout.colons else " ").join(layout.columns)
        raise InputError(f"{path}:{line + index}: {shown(text)} is not of the form {form!r}")
    values = []
    for column in layout.wanted:
        value, good = _parse_integers(data, starts[:, column], stops[:, column])
        if not good.all():
            row = int(np.argmin(good))
            token = block[starts[row, column] : stops[row, column]].decode(errors="replace")
            raise InputError(
                f"{path}:{line + filled[row]}: {layout.columns[column]} {shown(token)} "
                "is not an integer from 0 to 10^18 - 1"
            )
        values.append(value)
    return values, filled


def _parse_integers(
    data: NDArray[np.uint8], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(value, whether it is one) of the decimal integers data[starts:stops]."""
    lengths = stops - starts
    good = lengths <= _MOST_DIGITS
    value = np.zeros(len(starts), np.int64)
    for place in range(int(np.minimum(lengths, _MOST_DIGITS).max(initial=0))):
        # Anything but 0-9 becomes more than 9 in unsigned arithmetic.
        digit = data[np.minimum(starts + place, stops - 1)] - np.uint8(_ZERO)
        live = lengths > place
        good &= (digit <= 9) | ~live
        value = np.where(live, value * 10 + digit, value)
    return value, good
