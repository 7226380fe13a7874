"""Text tables: CSV, TSV and RecBole's .inter, read row by row in blocks. Ids may be any text.

Python's csv module knows the line of every row and refuses a row that is too short or too long.
polars reads five times as fast, but fills short rows up and names no line; who has it can give
its frames to `from_frame`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import re
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherkern.checks import check_choice
from fisherkern.data.actions import Actions, open_binary
from fisherkern.errors import InputError, one_line, shown

SEPARATORS = ",\t;|"
LONGEST_LINE = 1 << 20
# Few enough that Python's garbage collector, which counts 700 new lists, does not scan them.
_BLOCK_ROWS = 500
_LINE_BREAK = re.compile("\r\n|\r|\n")

Column = str | int


@dataclass(frozen=True)
class Columns:
    """Columns by name, or by index from 0 in a file without a header.

    `time` None means that the file is in time order already.
    """

    user: Column
    item: Column
    time: Column | None

    def __post_init__(self) -> None:
        kinds = set()
        for role, value in zip(("user", "item", "time"), self.wanted(), strict=False):
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise InputError(f"{role} must be a column's name or index, got {shown(value)}")
            kinds.add(type(value))
        if len(kinds) > 1:
            raise InputError("user, item and time must all be names, or all be indices")

    def wanted(self) -> list[Column]:
        """Return the columns that are read, in the order user, item, time."""
        return [self.user, self.item] + ([] if self.time is None else [self.time])

    def find(self, where: str, header: Sequence[str]) -> list[int]:
        """Return the indices of `wanted` among the names `header`; `where` begins the message."""
        for role, name in zip(("user", "item", "time"), self.wanted(), strict=False):
            if name not in header:
                hint = ", or None for a file in time order" if role == "time" else ""
                if any(_is_number(cell) for cell in header):
                    hint += "; in a file without header by its number from 0"
                raise InputError(
                    f"{where}: no column {shown(name)} among {one_line(', '.join(header), 300)}; "
                    f"name the {role} column with --{role} or {role}={hint}"
                )
            if list(header).count(str(name)) > 1:
                raise InputError(f"{where}: two columns are called {shown(name)}")
        return [header.index(str(name)) for name in self.wanted()]


class IdCodes(defaultdict[str, int]):
    """Text ids to codes 0, 1, ... in the order in which they are first asked for."""

    def __missing__(self, key: str) -> int:
        code = self[key] = len(self)
        return code

    def encode(self, values: Sequence[str]) -> NDArray[np.int32]:
        """Return the codes of `values`, (len(values),) int32."""
        return np.fromiter(map(self.__getitem__, values), np.int32, len(values))


@dataclass(frozen=True)
class TextForm:
    """How a file's lines are cut into cells.

    separator: None: the one of comma, tab, semicolon and bar that the first line has most of.
    header: whether the first line holds names; None: where columns are given by name.
    quotes: whether quotes hold a cell together; None: unless tabs do, whose texts have stray ones.
    """

    separator: str | None = None
    header: bool | None = None
    quotes: bool | None = None

    def __post_init__(self) -> None:
        separator = {"tab": "\t", "\\t": "\t"}.get(self.separator or "", self.separator)
        object.__setattr__(self, "separator", separator)
        if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
            raise InputError(f"separator must be one character, got {shown(separator)}")
        for name in ("header", "quotes"):
            check_choice(name, getattr(self, name), (True, False, None))


def read_csv(path: Path, columns: Columns, form: TextForm | None = None) -> Actions:
    """Text with a header, or indices for `columns`; cells may be quoted."""
    return _read_text(path, columns, form or TextForm(), typed=False)


def read_recbole(path: Path, columns: Columns) -> Actions:
    """RecBole's atomic .inter file: tab-separated, header cells `name:type`, no quoting."""
    return _read_text(path, columns, TextForm("\t", header=True, quotes=False), typed=True)


def _read_text(path: Path, columns: Columns, form: TextForm, *, typed: bool) -> Actions:
    users, items = IdCodes(), IdCodes()
    columns_read = new_columns()
    with open_binary(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="") as stream:
        try:
            first = stream.readline(LONGEST_LINE)
            if len(first) == LONGEST_LINE:
                raise InputError(f"{path}:1: longer than {LONGEST_LINE:,} characters")
            dialect = _dialect(form, first)
            reader = csv.reader(itertools.chain([first], stream), dialect)
            width, indices, rows = _start(path, reader, columns, form.header, typed)
            for block in rows:
                _check_rows(path, block, width, indices, columns)
                cells = list(zip(*block.rows, strict=True))
                values: list[NDArray[Any]] = [
                    users.encode(cells[indices[0]]),
                    items.encode(cells[indices[1]]),
                ]
                values.append(block.lines)
                if len(indices) > 2:
                    values.append(_times(path, block, cells[indices[2]], columns))
                append_block(columns_read, values)
        except csv.Error as error:
            raise InputError(_broken_row(path, dialect, error)) from None
        except UnicodeDecodeError:
            raise InputError(f"{path}:{undecodable_line(path)}: not UTF-8 text") from None
    return joined_blocks(path, columns, columns_read, users, items)


def _dialect(form: TextForm, first: str) -> type[csv.Dialect]:
    separator = form.separator or max(SEPARATORS, key=first.count)
    quotes = separator != "\t" if form.quotes is None else form.quotes

    class Form(csv.Dialect):
        delimiter, quotechar, doublequote, skipinitialspace = separator, '"', True, False
        quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        lineterminator, strict = "\n", True  # nothing may follow a closing quote

    return Form


def _broken_row(path: Path, dialect: type[csv.Dialect], error: csv.Error) -> str:
    """Return what is wrong, and the line in which the row starts that the reader gave up in."""
    line = 1
    with open_binary(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, dialect)
        with contextlib.suppress(csv.Error):
            for _ in reader:
                line = reader.line_num + 1
        more = reader.line_num - line
    if not more:
        return f"{path}:{line}: {error}"
    return (
        f"{path}:{line}: a quote opens a cell here that goes on for {more} lines and does not end; "
        "quotes=False (--no-quotes) takes quotes as they stand"
    )


def new_columns() -> list[array[Any]]:
    """Return the columns that `append_block` fills: users, items, lines and times."""
    return [array("i"), array("i"), array("i"), array("q")]


def joined_blocks(
    path: Path, columns: Columns, read: list[array[Any]], users: IdCodes, items: IdCodes
) -> Actions:
    """Return the rows that `append_block` has collected; InputError where there are none."""
    user, item, line, time = (np.frombuffer(column, column.typecode) for column in read)
    if not len(user):
        raise InputError(f"{path}:1: the file holds no interactions")
    times = None if columns.time is None else time
    return Actions(user, item, times, line, list(users), list(items))


def append_block(columns: list[array[Any]], values: list[NDArray[Any]]) -> None:
    """Add a block to the columns; the times, the last, stay integers while all of them are."""
    for index, new in enumerate(values):
        if new.dtype.kind == "f" and columns[index].typecode == "q":
            columns[index] = array("d", columns[index])
        columns[index].frombytes(new.astype(columns[index].typecode, copy=False).tobytes())


@dataclass
class _Block:
    """Rows that are not blank, and the line that each ends in."""

    rows: list[list[str]]
    lines: NDArray[np.int32]


def _read_blocks(reader: Any) -> Iterator[_Block]:
    while True:
        before = reader.line_num
        rows = list(itertools.islice(reader, _BLOCK_ROWS))
        if not rows:
            return
        lines = np.arange(before + 1, reader.line_num + 1, dtype=np.int32)
        if len(lines) != len(rows):  # quoted cells may go on over lines
            lines = np.cumsum([_height(row) for row in rows], dtype=np.int32) + np.int32(before)
        if not all(rows):
            lines = lines[[bool(row) for row in rows]]
            rows = [row for row in rows if row]
        if rows:
            yield _Block(rows, lines)


def _height(row: list[str]) -> int:
    return 1 + sum(len(_LINE_BREAK.findall(cell)) for cell in row)


def _start(
    path: Path, reader: Any, columns: Columns, header_line: bool | None, typed: bool
) -> tuple[int, list[int], Iterator[_Block]]:
    """(Cells in a row, the wanted columns' indices, the rows after the header)."""
    if not isinstance(columns.user, str):
        if header_line:
            next(reader, None)
        blocks = _read_blocks(reader)
        first = next(blocks, None)
        if first is None:
            return 0, [], iter(())
        width, indices = len(first.rows[0]), [int(index) for index in columns.wanted()]
        outside = next((index for index in indices if not 0 <= index < width), None)
        if outside is not None:
            line = first.lines[0]
            raise InputError(f"{path}:{line}: no column {outside}, only 0 to {width - 1}")
        return width, indices, itertools.chain([first], blocks)
    if header_line is False:
        raise InputError("user, item and time are numbers from 0 in a file without header")
    header: list[str] = next(reader, [])
    if not header:
        raise InputError(f"{path}:1: the file holds no interactions")
    if typed:
        untyped = next((cell for cell in header if ":" not in cell), None)
        if untyped is not None:
            raise InputError(
                f"{path}:1: header cell {shown(untyped)} has no type, as in 'user_id:token'"
            )
        header = [cell.rpartition(":")[0] for cell in header]
    return len(header), columns.find(f"{path}:1", header), _read_blocks(reader)


def _check_rows(
    path: Path, block: _Block, width: int, indices: list[int], columns: Columns
) -> None:
    """Raise InputError for the first row of another width or without an id."""
    user, item = indices[:2]
    if all(len(row) == width and row[user] and row[item] for row in block.rows):
        return
    for line, row in zip(block.lines.tolist(), block.rows, strict=True):
        if len(row) != width:
            named = "header names" if isinstance(columns.user, str) else "first row has"
            more = _height(row) - 1
            over = f" (a quoted cell goes on for {more} lines)" if more else ""
            where = f"{path}:{line - more}"
            raise InputError(f"{where}: {len(row)} columns{over}, but the {named} {width}")
        if not row[user] or not row[item]:
            column = columns.item if row[user] else columns.user
            raise InputError(f"{path}:{line}: {column} is empty")
        if len(indices) > 2:
            seconds_of(row[indices[2]], path, line, columns.time)


def _times(
    path: Path, block: _Block, cells: Sequence[str], columns: Columns
) -> NDArray[np.int64] | NDArray[np.float64]:
    """Return the block's times: int64 where all are whole numbers, float64 otherwise."""
    return times_of(path, block.lines, cells, columns.time)


def times_of(
    path: Path, lines: NDArray[np.int32], cells: Sequence[str], column: Column | None
) -> NDArray[np.int64] | NDArray[np.float64]:
    """Return times as they stand in a file: int64 where all are whole numbers, else float64."""
    try:
        return np.fromiter(map(int, cells), np.int64, len(cells))
    except (ValueError, OverflowError):
        numbered = zip(cells, lines.tolist(), strict=True)
        seconds = [seconds_of(cell, path, line, column) for cell, line in numbered]
        return np.array(seconds, np.float64)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d*)?", text.strip()) is not None


def seconds_of(cell: str, path: Path, line: int, column: Column | None) -> float:
    """Return a number as it stands, or the seconds since 1970 of an ISO date (UTC if unsaid)."""
    try:
        return float(cell)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(cell)
    except (ValueError, OverflowError):
        raise InputError(
            f"{path}:{line}: {column} {shown(cell)} is neither a number nor an ISO 8601 date"
        ) from None
    # A date without a zone is of UTC, so that no file depends on where it is read.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def undecodable_line(path: Path) -> int:
    """Return the first line that is not UTF-8."""
    with open_binary(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1
