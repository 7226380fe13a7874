"""`fisherkern demo`."""

from __future__ import annotations

import dataclasses

from fisherkern.cli.arguments import command
from fisherkern.cli.run import Run
from fisherkern.experiments import DEMO, MEMBERS
from fisherkern.experiments import run as run_story


@command("demo", choices={"members": MEMBERS})
def demo(
    run: Run, *, members: str = DEMO.members, data: str = "synthetic", threads: int = 1
) -> None:
    """Train, merge and compare a few small models on made-up data, in minutes.

    Args:
        members: how the members differ.
        data: synthetic, ml-1m, beauty, or a file.
        threads: CPU threads; the tensors are small, so a second one mostly waits.
    """
    story = dataclasses.replace(DEMO, data=data, members=members, seed=run.seed)
    run_story(story, run.out(f"demo-{members}"), progress=run.progress)
