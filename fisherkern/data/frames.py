"""Data frames of any library (polars, pandas, pyarrow, ...), and Parquet files by way of them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
from numpy.typing import NDArray

from fisherkern.checks import check_count, takes_numpy
from fisherkern.data.actions import Actions, assemble, number_ids
from fisherkern.data.dataset import SequenceDataset
from fisherkern.data.tables import Columns, IdCodes
from fisherkern.errors import InputError, one_line, shown

MOST_ROWS = 1 << 12  # for each byte of a file
_BLOCK_ROWS = 1 << 20  # bounds how many ids are Python strings at once


@takes_numpy
def from_frame(
    frame: Any,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str | None = "timestamp",
    name: str = "frame",
    min_actions: int = 3,
    drop_short: bool = False,
) -> SequenceDataset:
    """Make sequences of a data frame with one row per interaction.

    Internal ids follow the first appearance in the frame; every user's rows are sorted by time,
    equal times in the frame's order.

    Args:
        frame: polars, pandas, pyarrow or any other eager or lazy frame that narwhals knows.
        user: name of the column of user ids: integers or text, none missing.
        item: name of the column of item ids: integers or text, none missing.
        time: name of the column of times (numbers, dates or timestamps); None for a frame that
            is in time order already.
        name: the data set's name, for tables and file names.
        min_actions: least number of rows of a user.
        drop_short: leave out users with fewer rows, and items nobody else has, rather than raise.

    Returns:
        The sequences, one per user, oldest item first.

    Raises:
        InputError: no frame, a missing column, a missing or fractional id, a missing time, a
            column of another type, or a user with fewer than `min_actions` rows.
    """
    check_count("min_actions", min_actions)
    try:
        known = nw.from_native(frame)
    except TypeError:
        raise InputError(f"from_frame takes a data frame, got {type(frame).__name__}") from None
    except Exception as error:
        raise _unread(name, error) from error
    actions = frame_actions(known, Columns(user, item, time), name)
    return assemble(actions, Path(name), name=name, min_actions=min_actions, drop_short=drop_short)


def frame_actions(frame: Any, columns: Columns, where: str) -> Actions:
    """Return the interactions of a narwhals frame; `where` begins every message."""
    wanted = columns.wanted()
    try:
        columns.find(where, frame.collect_schema().names())
        frame = frame.select(*dict.fromkeys(wanted))
        frame = frame.collect() if isinstance(frame, nw.LazyFrame) else frame
        for name in wanted:
            empty = frame[name].is_null().to_numpy()
            if empty.any():
                raise InputError(f"{where}: row {int(empty.argmax()) + 1}: {name} is empty")
        users, user_ids = _codes(frame[columns.user], where)
        items, item_ids = _codes(frame[columns.item], where)
        times = None if columns.time is None else _times(frame[columns.time], where)
    except InputError:
        raise
    # Of whatever library the frame is: two columns of a name, or what it cannot turn into ours.
    except Exception as error:
        raise _unread(where, error) from error
    lines = np.arange(1, len(users) + 1)
    return Actions(users, items, times, lines, user_ids, item_ids, unit="row")


def _unread(where: str, error: Exception) -> InputError:
    return InputError(f"{where}: could not be read: {one_line(str(error), 200)}")


def read_parquet(path: Path, columns: Columns) -> Actions:
    """Parquet; needs pyarrow. Dates and timestamps are times, and so is any number."""
    try:
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from None
    if not isinstance(columns.user, str):
        raise InputError(f"{path}: the columns of a Parquet file have names: user='user_id', ...")
    try:
        about = parquet.read_metadata(path)
        columns.find(str(path), about.schema.to_arrow_schema().names)
        # A run of equal values takes no room: what a few bytes stand for would not fit in memory.
        if about.num_rows > MOST_ROWS * path.stat().st_size:
            raise InputError(f"{path}: {about.num_rows:,} rows are too many for its size")
        table = parquet.read_table(path, columns=columns.wanted())
    except (OSError, ValueError, arrow.ArrowException) as error:  # names that are no text too
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: could not be read as Parquet: {reason}") from error
    return frame_actions(nw.from_native(table), columns, str(path))


def _codes(column: Any, where: str) -> tuple[NDArray[np.int32], list[str]]:
    """Codes by first appearance, and the ids as text."""
    if column.dtype.is_integer():
        return number_ids(column.to_numpy(), by_appearance=True)
    if column.dtype.is_float():  # what pandas makes of integers in a column that had a gap once
        values = column.to_numpy()
        whole = values == np.floor(values)
        if not (whole & (np.abs(values) < 2**53)).all():
            row = int(np.argmin(whole & (np.abs(values) < 2**53)))
            raise InputError(
                f"{where}: row {row + 1}: {column.name} is {values[row]}, neither integer nor text"
            )
        return number_ids(values.astype(np.int64), by_appearance=True)
    if not isinstance(column.dtype, nw.String | nw.Categorical | nw.Enum | nw.Decimal):
        raise InputError(
            f"{where}: column {shown(column.name)} holds {column.dtype}, neither integers nor text"
        )
    codes, text = IdCodes(), column.cast(nw.String)
    blocks = [
        codes.encode(text[first : first + _BLOCK_ROWS].to_list())
        for first in range(0, len(text), _BLOCK_ROWS)
    ]
    return np.concatenate(blocks) if blocks else np.empty(0, np.int32), list(codes)


def _times(column: Any, where: str) -> NDArray[Any]:
    """Numbers as they are, dates and timestamps since 1970 in their own unit (UTC if unsaid)."""
    if column.dtype.is_temporal():
        if isinstance(column.dtype, nw.Datetime):
            unit = column.dtype.time_unit
            if unit == "s":  # in milliseconds the largest would wrap round
                return column.cast(nw.Int64).to_numpy()
            return column.dt.timestamp(unit).to_numpy()
        if column.dtype == nw.Date:
            return column.dt.timestamp("ms").to_numpy()
    elif column.dtype.is_numeric():
        times = column.to_numpy()
        if times.dtype.kind in "iuf":
            return times
    raise InputError(
        f"{where}: column {shown(column.name)} holds {column.dtype}, neither numbers nor dates"
    )
