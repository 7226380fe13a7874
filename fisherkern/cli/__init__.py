"""The command line: `fisherkern COMMAND`, the commands in the order of a project."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch

from fisherkern.cli import (
    align,
    data,
    demo,
    evaluate,
    fisher,
    merge,
    preflight,
    repair,
    representation_surgery,
    train,
)
from fisherkern.cli.parsing import make_app, parse
from fisherkern.errors import InputError

COMMANDS = (
    demo.show_demo,
    data.data,
    train.train_encoder,
    fisher.fisher,
    preflight.preflight_checkpoints,
    align.align_checkpoints,
    merge.merge_checkpoints,
    repair.repair_checkpoint,
    representation_surgery.correct_checkpoint,
    evaluate.evaluate_checkpoint,
)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: the command and its arguments; those of the process by default.

    Returns:
        The exit status: 0, 2 after one line on stderr that names what was wrong, or 130 where
        the user interrupted.
    """
    logging.basicConfig(format="%(message)s")
    words = sys.argv[1:] if words is None else words
    name = next((command.name for command in COMMANDS if command.name in words[:1]), None)
    try:
        parsed = parse(make_app(COMMANDS), words)
        if parsed is not None:
            command, run = parsed
            if run.values["threads"] is not None:
                torch.set_num_threads(run.values["threads"])
            own = run.of(command.run)
            command.run(run=run, **own)
    except InputError as error:
        print(f"fisherkern{' ' + name if name else ''}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0
