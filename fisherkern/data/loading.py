"""`load`: a data set by its name or its path."""

from __future__ import annotations

import os
from pathlib import Path

from fisherkern.checks import takes_numpy
from fisherkern.data.dataset import SequenceDataset
from fisherkern.data.download import download_ml_1m
from fisherkern.data.reading import read_file
from fisherkern.data.synthetic import synthetic
from fisherkern.data.tables import Column
from fisherkern.errors import InputError

_DATA_VARIABLE = "FISHERKERN_DATA"
_CACHE_VARIABLE = "FISHERKERN_CACHE"


@takes_numpy
def load(
    name_or_path: str | os.PathLike[str],
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
    time_split: float | None = None,
    time_targets: str = "last",
    time_validation: str = "time",
) -> SequenceDataset:
    r"""Read interactions as sequences, one per user, oldest item first.

    A name without folder or suffix is looked up as NAME.txt in the folder $FISHERKERN_DATA, then
    in the cache ($FISHERKERN_CACHE, else ~/.cache/fisherkern). "ml-1m" is otherwise downloaded
    into the cache from its publisher and verified; "synthetic" is `synthetic()`. Anything else is
    a file, gzipped or not:

    - "seqrec": `user item` lines with integer ids, every user's in time order. Internal ids
      follow the numerical order of the ids.
    - "movielens": `user::item::rating::timestamp` lines with integer ids.
    - "csv": text with any separator; cells may be quoted. Columns by name from the header, or by
      index in a file without one. Times are numbers or ISO 8601 dates.
    - "recbole": the .inter file, tab-separated with header cells `name:type`.
    - "parquet": needs pyarrow.
    - "json": a record a line, JSON or a Python dictionary, columns by name.

    All but seqrec number internal ids by first appearance in the file and sort every user's rows
    by time, equal times in file order. Attributes come from PATH.attributes.json (the suffix
    replaced), item -> list of attribute numbers; items unknown here are ignored.

    Of a table of millions of rows, `from_frame(polars.read_csv(path))` takes about half the time.

    Args:
        name_or_path: a data set's name, or a file.
        format: one of the names above; "auto" goes by the suffix (.csv, .tsv, .inter, .parquet,
            .json, .jsonl, each also with .gz) and then by the first line.
        name: the data set's name, for tables and file names; default: the file's.
        min_actions: least number of rows of a user, default 3.
        drop_short: leave out users with fewer rows, and items nobody else has, rather than raise.
        user: column of user ids, its name or its index from 0.
        item: column of item ids, likewise.
        time: column of times, likewise; None for a file in time order already.
        separator: one character or "tab", for "csv"; None: the most frequent of comma, tab,
            semicolon and bar in the first line.
        header: whether a "csv" begins with a line of names; None: where columns are named.
        quotes: whether quotes hold a cell of a "csv" together; None: unless tabs separate cells.
        time_split: the quantile of all times after which actions are held out, such as 0.9; see
            `SequenceDataset.split_by_time`. None: leave-one-out.
        time_targets: which later actions are ranked, "last" or "successive".
        time_validation: what validates under `time_split`, "time" or "last-item".

    Returns:
        The sequences, with internal item ids 1..V.

    Raises:
        InputError: anything unreadable, a missing id or time, a short user, or a split by time of
            a file without times; one sentence with the file and the line.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import fisherkern as fk
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "ratings.csv"
        ...     rows = ["userId;movieId;when", "7;30;2024-05-02", "7;10;2024-05-01"]
        ...     _ = path.write_text("\n".join(rows))
        ...     data = fk.load(path, user="userId", item="movieId", time="when", min_actions=2)
        >>> data
        SequenceDataset('ratings': 1 users, 2 items, 2 actions)
        >>> [data.item_ids[item - 1] for item in data.sequence(0)]
        ['10', '30']
    """
    text = os.fspath(name_or_path)
    if text == "synthetic":
        path, data = Path(text), synthetic()
    else:
        path = _named_file(text) if _is_name(text) else Path(text)
        data = read_file(
            path,
            format=format,
            name=name,
            min_actions=min_actions,
            drop_short=drop_short,
            user=user,
            item=item,
            time=time,
            separator=separator,
            header=header,
            quotes=quotes,
        )
    if time_split is None:
        if (time_targets, time_validation) != ("last", "time"):
            raise InputError("time_targets and time_validation are of a time_split; give one")
        return data
    if data.times is None:
        raise InputError(f"{path}: its actions have no times, which time_split={time_split} needs")
    return data.split_by_time(time_split, targets=time_targets, validation=time_validation)


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
