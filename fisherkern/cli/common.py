"""What the commands share: their common options, the data, the folder, result.json."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fisherkern import data as data_package
from fisherkern.data import SequenceDataset
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.evaluation import Report, evaluate
from fisherkern.files import write_json

Command = Callable[[argparse.Namespace], None]


def command(commands: Any, name: str, function: Command, summary: str) -> argparse.ArgumentParser:
    """A sub-command with the options that all share."""
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--data", help="ml-1m, beauty, synthetic, or a file")
    parser.add_argument("--out", type=Path, help="folder for the results (default: runs/...)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=function)
    return parser


def load_data(name: str | None) -> SequenceDataset:
    """The data set of --data, or of a recipe's key."""
    if name is None:
        raise InputError("--data: name a data set (ml-1m, beauty, synthetic) or a file")
    return data_package.load(name)


def out_folder(options: argparse.Namespace, default: str) -> Path:
    return options.out if options.out is not None else Path("runs") / default


def over_catalogue_of(model: SequenceEncoder, data: SequenceDataset, path: Path) -> SequenceDataset:
    """The data over the model's catalogue, which may hold more items: a merge's union."""
    if model.item_ids is not None and list(model.item_ids) != list(data.item_ids):
        return data.with_items(model.item_ids)
    if model.num_items != data.num_items:
        raise InputError(f"{path}: its catalogue is not that of {data.name}")
    return data


def on_validation(model: SequenceEncoder, data: SequenceDataset) -> Report:
    """What members and merged models are chosen by: the metrics at 10 of the validation items."""
    own = over_catalogue_of(model, data, Path("the model"))
    return evaluate(model, own, split="validation", k=10)


def finish(out: Path, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """result.json: the command's arguments and what it found."""
    arguments = {
        name: value if isinstance(value, (int, float, str, list, tuple, type(None))) else str(value)
        for name, value in vars(options).items()
        if name != "run"
    }
    arguments = {
        name: [str(entry) for entry in value] if isinstance(value, (list, tuple)) else value
        for name, value in arguments.items()
    }
    write_json(out / "result.json", {"arguments": arguments, **result})
