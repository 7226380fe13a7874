"""The command line: `fisherkern COMMAND`, the commands in the order of a project."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fisherkern import processes
from fisherkern.cli import (
    align,
    data,
    demo,
    evaluate,
    fisher,
    merge,
    preflight,
    repair,
    report,
    representation_surgery,
    train,
)
from fisherkern.cli.arguments import Command
from fisherkern.cli.parsing import make_app, parse
from fisherkern.cli.run import Run
from fisherkern.errors import InputError, one_line, shown
from fisherkern.interrupts import raise_again

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
    report.report_merge,
)


# Commands that go on from what they have stored.
RESUMED = ("demo", "train")
# Commands of one process.
ALONE = ("demo", "data")


def _message(error: Exception) -> str | None:
    """Return what to say of an error that is the input's or the machine's; None for one of ours."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        where = "" if error.filename is None else f"{shown(os.fsdecode(error.filename))}: "
        return f"{where}{error.strerror}"
    if isinstance(error, RuntimeError) and "gloo" in str(error).lower():
        return processes.ENDED
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc" in str(error).lower():
        return f"not enough memory: {one_line(str(error), 200)}"
    return None


@contextlib.contextmanager
def _among_others(command: Command, run: Run) -> Iterator[None]:
    """Join the processes that torchrun started, of which the first alone prints."""
    started = processes.started_by_torchrun()
    if started == 1:
        yield
        return
    if command.name in ALONE:
        raise InputError(f"takes one process, and torchrun started {started}")
    with processes.joined_by_torchrun(run.device.type), contextlib.ExitStack() as stack:
        processes.check_same({"arguments": run.values})
        if processes.rank() > 0:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            logging.getLogger("fisherkern").setLevel(logging.ERROR)
        yield


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
        raise_again()
        parsed = parse(make_app(COMMANDS), words)
        if parsed is not None:
            command, run = parsed
            if run.values["threads"] is not None:
                torch.set_num_threads(run.values["threads"])
            own = run.of(command.run)
            with run.claims, _among_others(command, run):
                command.run(run=run, **own)
    except (InputError, MemoryError, OSError, RuntimeError) as error:
        message = _message(error)
        if message is None:
            raise
        print(f"fisherkern{' ' + name if name else ''}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; run the same command again to continue" if name in RESUMED else ""
        if processes.first_of_torchrun():
            print(f"interrupted{again}", file=sys.stderr)
        return 130
    return 0
