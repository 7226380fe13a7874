"""`fisherkern recalibrate`."""

from __future__ import annotations

import argparse
from typing import Any

from fisherkern.cli.calibrate import add_merged
from fisherkern.cli.common import command, finish, load_data, out_folder, over_catalogue_of
from fisherkern.cli.recipe import weights_from
from fisherkern.merging import recalibrate
from fisherkern.training import load_model, save_model


def add_recalibrate(commands: Any) -> None:
    parser = command(
        commands,
        "recalibrate",
        _recalibrate,
        "a merged model's layer norms refitted to its members' statistics, at no cost in inference",
    )
    add_merged(parser)
    parser.add_argument("--limit", type=int, help="histories of --data (default: one of each user)")


def _recalibrate(options: argparse.Namespace) -> None:
    merged = load_model(options.checkpoint)
    data = over_catalogue_of(merged, load_data(options.data), options.checkpoint)
    recalibrated = recalibrate(
        merged,
        [load_model(path) for path in options.members],
        data.loader(split="train", max_len=merged.max_len, limit=options.limit),
        weights=weights_from(options.weights),  # type: ignore[arg-type]  # a word is refused there
    )
    out = out_folder(options, "recalibrate")
    path = out / "recalibrated.safetensors"
    about = {"merged": str(options.checkpoint), "members": [str(own) for own in options.members]}
    save_model(recalibrated, path, extra={"recalibrated": about})
    finish(out, options, {})
    print(f"written to {path}")
