"""Files with named columns: CSV, RecBole's .inter and Parquet. Ids may be any text."""

from __future__ import annotations

import csv
import importlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fisherkern.data.actions import Actions
from fisherkern.errors import InputError


@dataclass(frozen=True)
class Columns:
    """The columns' names; `time` None means that the file is in time order already."""

    user: str
    item: str
    time: str | None

    def names(self) -> list[str]:
        return [self.user, self.item] + ([] if self.time is None else [self.time])


def read_csv(path: Path, columns: Columns) -> Actions:
    """Comma-separated text with a header; cells may be quoted."""
    return _read_text(path, columns, typed=False)


def read_recbole(path: Path, columns: Columns) -> Actions:
    """RecBole's atomic .inter file: tab-separated, header cells `name:type`, no quoting."""
    return _read_text(path, columns, typed=True)


def _read_text(path: Path, columns: Columns, *, typed: bool) -> Actions:
    user_codes: dict[str, int] = {}
    item_codes: dict[str, int] = {}
    users, items, lines = array("i"), array("i"), array("i")
    times = array("d")
    with path.open(encoding="utf-8-sig", newline="") as stream:
        if typed:
            reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.reader(stream)
        try:
            header = next(reader, [])
            places = _find_columns(path, header, columns, typed)
            user_place, item_place = places[:2]
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"{path}:{reader.line_num}: {len(row)} columns, "
                        f"but the header names {len(header)}"
                    )
                user, item = row[user_place], row[item_place]
                if not user or not item:
                    column = columns.item if user else columns.user
                    raise InputError(f"{path}:{reader.line_num}: {column} is empty")
                users.append(user_codes.setdefault(user, len(user_codes)))
                items.append(item_codes.setdefault(item, len(item_codes)))
                lines.append(reader.line_num)
                if columns.time is not None:
                    times.append(_seconds(row[places[2]], path, reader.line_num, columns.time))
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num}: {error}") from None
        except UnicodeDecodeError:
            raise InputError(f"{path}:{_undecodable_line(path)}: not UTF-8 text") from None
    return Actions(
        np.frombuffer(users, np.int32),
        np.frombuffer(items, np.int32),
        None if columns.time is None else np.frombuffer(times, np.float64),
        np.frombuffer(lines, np.int32),
        list(user_codes),
        list(item_codes),
    )


def _find_columns(path: Path, header: list[str], columns: Columns, typed: bool) -> list[int]:
    if not header:
        raise InputError(f"{path}:1: the file holds no interactions")
    if typed:
        untyped = next((cell for cell in header if ":" not in cell), None)
        if untyped is not None:
            raise InputError(
                f"{path}:1: header cell {untyped!r} has no type, as in 'user_id:token'"
            )
        header = [cell.rpartition(":")[0] for cell in header]
    _check_columns(f"{path}:1", header, columns)
    return [header.index(name) for name in columns.names()]


def _check_columns(place: str, header: Sequence[str], columns: Columns) -> None:
    for role, name in zip(("user", "item", "time"), columns.names(), strict=False):
        if name not in header:
            hint = ", or None for a file in time order" if role == "time" else ""
            raise InputError(
                f"{place}: no column {name!r} among {', '.join(header)}; "
                f"name the {role} column with {role}_col{hint}"
            )


def _seconds(cell: str, path: Path, line: int, column: str) -> float:
    """A number as it stands, or the seconds since 1970 of an ISO 8601 date (UTC if unsaid)."""
    try:
        return float(cell)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(cell)
    except ValueError:
        raise InputError(
            f"{path}:{line}: {column} {cell!r} is neither a number nor an ISO 8601 date"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def read_parquet(path: Path, columns: Columns) -> Actions:
    """Parquet; needs pyarrow. Dates and timestamps are times, and so is any number."""
    try:
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from None
    try:
        _check_columns(str(path), parquet.read_schema(path).names, columns)
        table = parquet.read_table(path, columns=columns.names())
    except (OSError, arrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: could not be read as Parquet: {reason}") from error
    for name in columns.names():
        if table[name].null_count:
            row = table[name].is_null().to_numpy().argmax() + 1
            raise InputError(f"{path}: row {row}: {name} is empty")
    users, user_ids = _text_codes(arrow, table[columns.user])
    items, item_ids = _text_codes(arrow, table[columns.item])
    times = None
    if columns.time is not None:
        times = _arrow_times(arrow, table[columns.time], path, columns.time)
    lines = np.arange(1, len(users) + 1, dtype=np.int32)
    return Actions(users, items, times, lines, user_ids, item_ids, unit="row")


def _text_codes(arrow: Any, column: Any) -> tuple[np.ndarray, list[str]]:
    encoded = column.cast(arrow.string()).combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy(), encoded.dictionary.to_pylist()


def _arrow_times(arrow: Any, column: Any, path: Path, name: str) -> np.ndarray:
    if arrow.types.is_temporal(column.type):
        column = column.cast(arrow.timestamp("us")).cast(arrow.int64())
    times = column.to_numpy()
    if times.dtype.kind not in "iuf":
        raise InputError(f"{path}: column {name!r} holds {column.type}, neither numbers nor dates")
    return times
