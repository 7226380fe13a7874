"""One file of interactions to a SequenceDataset (`read_file`), and back (`write_seqrec`)."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np

from fisherkern.checks import check_choice, check_count
from fisherkern.data.actions import assemble, base_path, open_binary
from fisherkern.data.dataset import SequenceDataset
from fisherkern.data.frames import read_parquet
from fisherkern.data.integers import read_movielens, read_seqrec
from fisherkern.data.tables import Column, Columns, read_csv, read_recbole
from fisherkern.errors import InputError, shown
from fisherkern.files import atomic_path, write_json

FORMATS = ("seqrec", "movielens", "csv", "recbole", "parquet")
_FORMAT_OF_SUFFIX = {
    ".dat": "movielens",
    ".csv": "csv",
    ".tsv": "csv",
    ".inter": "recbole",
    ".parquet": "parquet",
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
) -> SequenceDataset:
    """Read one file of interactions; the arguments and errors are those of `load`."""
    path = Path(path)
    check_choice("format", format, ("auto", *FORMATS))
    check_count("min_actions", min_actions)
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    columns = Columns(user, item, time)
    try:
        match detect_format(path) if format == "auto" else format:
            case "seqrec":
                actions = read_seqrec(path)
            case "movielens":
                actions = read_movielens(path)
            case "csv":
                actions = read_csv(path, columns, separator)
            case "recbole":
                actions = read_recbole(path, columns)
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
    if b"\t" in first and b":" in first:
        return "recbole"
    return "csv" if b"," in first else "seqrec"


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
