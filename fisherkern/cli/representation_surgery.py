"""`fisherkern representation-surgery`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fisherkern.cli.common import command, finish, load_data, out_folder, over_catalogue_of
from fisherkern.cli.recipe import weights_from
from fisherkern.encoders import SequenceEncoder
from fisherkern.postmerge import representation_surgery
from fisherkern.training import load_model, save_model


def add_representation_surgery(commands: Any) -> None:
    parser = command(
        commands,
        "representation-surgery",
        _representation_surgery,
        "train low-rank corrections that move a merged model's representations to its members'",
    )
    add_merged(parser)
    parser.add_argument(
        "--version", type=int, default=1, help="2: after every Transformer block as well"
    )
    parser.add_argument("--rank", type=int, default=16, help="of a correction (default: 16)")
    parser.add_argument("--steps", type=int, default=500, help="of Adam (default: 500)")
    parser.add_argument("--lr", type=float, default=1e-3, help="(default: 0.001)")


def add_merged(parser: argparse.ArgumentParser) -> None:
    """A merged model, and what it was merged from."""
    parser.add_argument("checkpoint", type=Path, help="the merged model")
    parser.add_argument("--members", type=Path, nargs="+", required=True)
    parser.add_argument("--weights", help="of the members, comma-separated (default: equal)")


def _representation_surgery(options: argparse.Namespace) -> None:
    data = load_data(options.data)
    merged = load_model(options.checkpoint)

    def histories(model: SequenceEncoder) -> Iterable[Any]:
        own = over_catalogue_of(model, data, options.checkpoint)
        return own.loader(split="train", batch_size=128, max_len=model.max_len)

    corrected = representation_surgery(
        merged,
        [load_model(path) for path in options.members],
        histories,
        version=options.version,
        weights=weights_from(options.weights),  # type: ignore[arg-type]  # a word is refused there
        rank=options.rank,
        steps=options.steps,
        lr=options.lr,
        seed=options.seed,
    )
    out = out_folder(options, "representation-surgery")
    path = out / "corrected.safetensors"
    save_model(corrected, path, extra={"losses": corrected.losses})
    finish(out, options, {"losses": corrected.losses})
    if corrected.losses:
        print(f"distance to the members: {corrected.losses[0]:.4g} before the first step,")
        print(f"                         {corrected.losses[-1]:.4g} before the last")
    print(f"written to {path}")
