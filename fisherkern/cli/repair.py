"""`fisherkern repair`."""

from __future__ import annotations

import argparse
from typing import Any

from fisherkern.cli.common import command, finish, load_data, out_folder, over_catalogue_of
from fisherkern.cli.recipe import weights_from
from fisherkern.cli.representation_surgery import add_merged
from fisherkern.postmerge import repair
from fisherkern.training import load_model, save_model


def add_repair(commands: Any) -> None:
    parser = command(
        commands,
        "repair",
        _repair,
        "refit a merged model's layer norms to its members' statistics; inference costs the same",
    )
    add_merged(parser)
    parser.add_argument("--limit", type=int, help="histories of --data (default: one of each user)")


def _repair(options: argparse.Namespace) -> None:
    merged = load_model(options.checkpoint)
    data = over_catalogue_of(merged, load_data(options.data), options.checkpoint)
    repaired = repair(
        merged,
        [load_model(path) for path in options.members],
        data.loader(split="train", max_len=merged.max_len, limit=options.limit),
        weights=weights_from(options.weights),  # type: ignore[arg-type]  # a word is refused there
    )
    out = out_folder(options, "repair")
    path = out / "repaired.safetensors"
    about = {"merged": str(options.checkpoint), "members": [str(own) for own in options.members]}
    save_model(repaired, path, extra={"repaired": about})
    finish(out, options, {})
    print(f"written to {path}")
