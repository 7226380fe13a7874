"""The command line: `fisherkern COMMAND`, the commands in the order of a project."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from fisherkern.cli.align import add_align
from fisherkern.cli.data import add_data
from fisherkern.cli.demo import add_demo
from fisherkern.cli.evaluate import add_evaluate
from fisherkern.cli.fisher import add_fisher
from fisherkern.cli.merge import add_merge
from fisherkern.cli.options import flags_from
from fisherkern.cli.preflight import add_preflight
from fisherkern.cli.repair import add_repair
from fisherkern.cli.representation_surgery import add_representation_surgery
from fisherkern.cli.train import add_train
from fisherkern.errors import InputError

COMMANDS = (
    add_demo,
    add_train,
    add_preflight,
    add_align,
    add_fisher,
    add_merge,
    add_repair,
    add_representation_surgery,
    add_evaluate,
    add_data,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after one line on stderr that names what was wrong."""
    logging.basicConfig(format="%(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if getattr(options, "config", None) is not None:
            flags = flags_from(options.config, options)
            options = parser.parse_args([options.command, *flags, *arguments[1:]])
        _check_shared(options)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        options.run(options)
    except InputError as error:
        print(f"fisherkern {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is stored", file=sys.stderr)
        return 130
    return 0


def _check_shared(options: argparse.Namespace) -> None:
    """What all commands take; a folder that cannot be written is said before the work."""
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads: must be at least 1, got {options.threads}")
    if options.out is not None:
        there = next(path for path in (options.out, *options.out.parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise InputError(f"{options.out}: no folder can be written there")


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fisherkern", description="Fisher-weighted merging of next-item recommenders."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser
