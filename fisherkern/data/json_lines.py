"""Files of one record a line: JSON, or the Python dictionaries that Steam's reviews come as."""

from __future__ import annotations

import ast
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fisherkern.data.actions import Actions, open_binary
from fisherkern.data.tables import (
    LONGEST_LINE,
    Columns,
    IdCodes,
    append_block,
    joined_blocks,
    new_columns,
    times_of,
    undecodable_line,
)
from fisherkern.documents import parse_json
from fisherkern.errors import InputError, shown

_BLOCK_ROWS = 500


def read_json_lines(path: Path, columns: Columns) -> Actions:
    """Read records with columns by name; ids are texts or integers, times numbers or dates."""
    if not isinstance(columns.user, str):
        raise InputError(f"{path}: the columns of records have names: user='user_id', ...")
    users, items = IdCodes(), IdCodes()
    read = new_columns()
    with open_binary(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="\n") as stream:
        try:
            records = _records(path, stream, columns)
            while block := list(itertools.islice(records, _BLOCK_ROWS)):
                lines, *cells = zip(*block, strict=True)
                numbers = np.array(lines, np.int32)
                values: list[Any] = [users.encode(cells[0]), items.encode(cells[1]), numbers]
                if columns.time is not None:
                    values.append(times_of(path, numbers, cells[2], columns.time))
                append_block(read, values)
        except UnicodeDecodeError:
            raise InputError(f"{path}:{undecodable_line(path)}: not UTF-8 text") from None
    return joined_blocks(path, columns, read, users, items)


def _records(path: Path, stream: io.TextIOWrapper, columns: Columns) -> Iterator[tuple[Any, ...]]:
    """Yield (line, user, item, time) of every line that is not blank, the last three as text."""
    number = 0
    while line := stream.readline(LONGEST_LINE):
        number += 1
        where = f"{path}:{number}"
        if len(line) == LONGEST_LINE:
            raise InputError(f"{where}: longer than {LONGEST_LINE:,} characters")
        if not line.strip():
            continue
        record = _record(where, line)
        yield number, *(_cell(where, record, str(name)) for name in columns.wanted())


def _record(where: str, line: str) -> dict[str, Any]:
    try:
        record = parse_json(where, line)
    except InputError as error:
        try:  # a literal alone: nothing is called
            record = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise error from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: no record, but {shown(record)}")
    return record


def _cell(where: str, record: dict[str, Any], name: str) -> str:
    if name not in record:
        raise InputError(f"{where}: the record has no {shown(name)}, only {shown(list(record))}")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise InputError(f"{where}: {name} is {shown(value)}, neither a number nor text")
    return value if isinstance(value, str) else str(value)
