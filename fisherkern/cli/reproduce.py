"""`fisherkern reproduce`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fisherkern.cli.common import command, out_folder
from fisherkern.errors import InputError
from fisherkern.experiments import MEMBERS, Story, run


def add_reproduce(commands: Any) -> None:
    parser = command(commands, "reproduce", _reproduce, "an experiment on real data")
    parser.add_argument("experiment", choices=["merge"])
    parser.add_argument("--members", choices=MEMBERS, default="shards")
    for field in dataclasses.fields(Story):
        if field.name not in ("data", "members", "seed"):
            kind = type(field.default)
            name = "--" + field.name.replace("_", "-")
            parser.add_argument(name, type=kind, default=field.default, metavar=kind.__name__)


def _reproduce(options: argparse.Namespace) -> None:
    if options.data is None:
        raise InputError("--data: name a data set (ml-1m, beauty) or a file")
    names = [field.name for field in dataclasses.fields(Story)]
    story = Story(**{name: getattr(options, name) for name in names})
    default = f"merge-{Path(options.data).stem}-{story.members}-{story.seed}"
    run(story, out_folder(options, default), progress=not options.quiet)
