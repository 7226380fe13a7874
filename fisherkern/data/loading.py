"""`load`: a data set by its name or its path."""

from __future__ import annotations

import os
from pathlib import Path

from fisherkern.data.dataset import SequenceDataset
from fisherkern.data.download import download_ml_1m
from fisherkern.data.reading import read_file
from fisherkern.data.synthetic import synthetic
from fisherkern.errors import InputError

_DATA_VARIABLE = "FISHERKERN_DATA"
_CACHE_VARIABLE = "FISHERKERN_CACHE"


def load(
    name_or_path: str | os.PathLike[str],
    *,
    format: str = "auto",
    name: str | None = None,
    min_actions: int = 3,
    drop_short: bool = False,
    user_col: str = "user_id",
    item_col: str = "item_id",
    time_col: str | None = "timestamp",
) -> SequenceDataset:
    """Read interactions as sequences, one per user, oldest first.

    A name without folder or suffix means NAME.txt in the folder $FISHERKERN_DATA, then
    in the cache ($FISHERKERN_CACHE, else ~/.cache/fisherkern); "ml-1m" is otherwise
    downloaded into the cache from its publisher and verified, and "synthetic" is
    `synthetic()`. Anything else is a file in one of the formats:

    - "seqrec": `user item` lines with integer ids, in time order in every user. Internal
      ids follow the numerical order of the ids.
    - "movielens": `user::item::rating::timestamp` lines with integer ids.
    - "csv": a header, and the columns user_col, item_col and time_col (numbers or ISO 8601
      dates; time_col=None for a file in time order already).
    - "recbole": the .inter file, tab-separated with header cells `name:type`; columns as in CSV.
    - "parquet": columns as in CSV; needs pyarrow.

    "auto" goes by the suffix (.dat, .csv, .inter, .parquet) and then by the first line.
    All but seqrec number internal ids by first appearance in the file and sort every
    user's rows by time, equal times in file order. PATH.attributes.json (the suffix
    replaced) gives item -> list of attribute numbers; items unknown here are ignored.

    A user with fewer than `min_actions` rows is an error, or left out with
    `drop_short=True`, together with items nobody else has. `name` is the data set's name
    (default: the file's).

    Raises InputError, one sentence with file and line, for anything unreadable.
    """
    text = os.fspath(name_or_path)
    if text == "synthetic":
        return synthetic()
    path = _named_file(text) if _is_name(text) else Path(text)
    return read_file(
        path,
        format=format,
        name=name,
        min_actions=min_actions,
        drop_short=drop_short,
        user_col=user_col,
        item_col=item_col,
        time_col=time_col,
    )


def cache_folder() -> Path:
    """Where downloads go: $FISHERKERN_CACHE, else ~/.cache/fisherkern. Not created here."""
    named = os.environ.get(_CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "fisherkern"


def _is_name(text: str) -> bool:
    return Path(text).name == text and not Path(text).suffix and not Path(text).is_file()


def _named_file(name: str) -> Path:
    folders = [cache_folder()]
    if named := os.environ.get(_DATA_VARIABLE):
        if not Path(named).is_dir():
            raise InputError(f"{_DATA_VARIABLE} names {named}, which is not a folder")
        folders.insert(0, Path(named))
    for folder in folders:
        if (folder / f"{name}.txt").is_file():
            return folder / f"{name}.txt"
    if name == "ml-1m":
        return download_ml_1m(cache_folder())
    searched = " nor in ".join(str(folder) for folder in folders)
    unset = "" if len(folders) == 2 else f" ({_DATA_VARIABLE} is not set)"
    raise InputError(
        f"{name}: no file of that name and no {name}.txt in {searched}{unset}; "
        "only ml-1m is downloaded by itself"
    )
