"""`fisherkern demo`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from fisherkern.cli.common import command, out_folder
from fisherkern.experiments import DEMO, MEMBERS, run


def add_demo(commands: Any) -> None:
    parser = command(commands, "demo", _demo, "the whole story on made-up data, in minutes")
    parser.add_argument("--members", choices=MEMBERS, default=DEMO.members)
    # Its tensors are small: a second thread mostly waits for the first.
    parser.set_defaults(data="synthetic", threads=1)


def _demo(options: argparse.Namespace) -> None:
    story = dataclasses.replace(DEMO, data=options.data, members=options.members, seed=options.seed)
    run(story, out_folder(options, f"demo-{story.members}"), progress=not options.quiet)
