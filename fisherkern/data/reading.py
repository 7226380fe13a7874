"""One file of interactions to a SequenceDataset (`read_file`), and back (`write_seqrec`)."""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path

import numpy as np

from fisherkern.checks import check_choice, check_count
from fisherkern.data.actions import assemble, base_path, open_binary
from fisherkern.data.dataset import SequenceDataset
from fisherkern.data.frames import read_parquet
from fisherkern.data.integers import BOM, read_movielens, read_seqrec
from fisherkern.data.json_lines import read_json_lines
from fisherkern.data.tables import Column, Columns, TextForm, read_csv, read_recbole
from fisherkern.errors import InputError, shown
from fisherkern.files import atomic_path, is_file, write_json

FORMATS = ("seqrec", "movielens", "csv", "recbole", "parquet", "json")
_FORMAT_OF_SUFFIX = {
    ".csv": "csv",
    ".tsv": "csv",
    ".inter": "recbole",
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
}


def read_file(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    name: str | None = None,
    min_actions: int = 3,
    drop_short: bool = False,
    user: Column = "user_id",
    item: Column = "item_id",
    time: Column | None = "timestamp",
    separator: str | None = None,
    header: bool | None = None,
    quotes: bool | None = None,
) -> SequenceDataset:
    """Read one file of interactions; the arguments and errors are those of `load`."""
    path = Path(path)
    check_choice("format", format, ("auto", *FORMATS))
    check_count("min_actions", min_actions)
    if not is_file(path):
        raise InputError(f"{path}: no such file")
    columns, form = Columns(user, item, time), TextForm(separator, header, quotes)
    try:
        match detect_format(path) if format == "auto" else format:
            case "seqrec":
                actions = read_seqrec(path)
            case "movielens":
                actions = read_movielens(path)
            case "csv":
                actions = read_csv(path, columns, form)
            case "recbole":
                actions = read_recbole(path, columns)
            case "json":
                actions = read_json_lines(path, columns)
            case _:
                actions = read_parquet(path, columns)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: could not be read: {reason}") from error
    return assemble(
        actions,
        path,
        name=base_path(path).stem if name is None else name,
        min_actions=min_actions,
        drop_short=drop_short,
    )


def detect_format(path: Path) -> str:
    """Return the format that the suffix names, or that the first line looks like."""
    suffix = base_path(path).suffix
    if suffix in _FORMAT_OF_SUFFIX:
        return _FORMAT_OF_SUFFIX[suffix]
    with open_binary(path) as stream:
        first = stream.readline(1 << 16)
    if b"::" in first:
        return "movielens"
    if first.removeprefix(BOM).lstrip().startswith(b"{"):
        return "json"
    cells = first.removeprefix(BOM).split(b"\t")
    if len(cells) > 1 and all(re.fullmatch(rb"\s*\w+:\w+\s*", cell) for cell in cells):
        return "recbole"
    if any(mark in first for mark in (b",", b";", b"|")) or len(cells) > 2:
        return "csv"
    # Two integers with a tab between them may stand in `user item` lines as well.
    numbers = [cell.strip().isdigit() for cell in cells]
    return "seqrec" if len(cells) == 1 or all(numbers) else "csv"


def write_seqrec(data: SequenceDataset, path: str | os.PathLike[str]) -> None:
    """Write `user item` lines, and the attributes, if any, as .attributes.json beside them.

    `load` gives the sequences back, with ids numbered in numerical order. Each file is
    written whole or not at all. Raises InputError for an id that is not an integer from
    0 up, which this format cannot hold.
    """
    for kind, ids in (("user", data.user_ids), ("item", data.item_ids)):
        wrong = next((value for value in ids if not (value.isascii() and value.isdigit())), None)
        if wrong is not None:
            raise InputError(f"{path}: {kind} id {shown(wrong)} is not an integer from 0 up")
    path = Path(path)
    if data.attributes is not None:
        write_json(path.with_suffix(".attributes.json"), data.attributes)
    item_ids = np.asarray(data.item_ids, dtype=object)
    with atomic_path(path) as temporary, temporary.open("w", encoding="ascii") as stream:
        for number, user in enumerate(data.user_ids):
            items = item_ids[data.sequence(number) - 1]
            stream.write("".join([f"{user} {item}\n" for item in items]))
