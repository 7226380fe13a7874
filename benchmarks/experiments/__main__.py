"""The papers' experiments: python -m benchmarks.experiments table2 --data ml-1m --time-limit 60

Run it from the root of the checkout. A call goes on from what the folder --out holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.experiments import EXPERIMENTS, Paper, run_paper, run_table
from fisherkern.errors import InputError


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one experiment; 0, 2 after one line on stderr that names the error, 130 on Ctrl-C."""
    options = parser().parse_args(arguments)
    try:
        run(options)
    except InputError as error:
        print(f"experiments {options.experiment}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is stored", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    description = str(__doc__).partition("\n\n")[2]
    result = _Parser(prog="python -m benchmarks.experiments", description=description)
    names = result.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, kind in EXPERIMENTS.items():
        summary = str(kind.__doc__)
        own = names.add_parser(
            name,
            help=summary.partition("\n")[0],
            description=summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        own.add_argument("--data", required=True, help="a data set (ml-1m, beauty) or a file")
        own.add_argument("--out", type=Path, help="folder of the results (default: runs/...)")
        own.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
        own.add_argument("--seeds", type=int, default=1, help="number of seeds (default: 1)")
        own.add_argument(
            "--time-limit", type=float, metavar="MIN", help="stop after this; rerun to go on"
        )
        own.add_argument("--threads", type=int, help="CPU threads")
        own.add_argument("--quiet", action="store_true", help="no progress bars")
        settings = own.add_argument_group("settings", "some defaults are others on beauty")
        for field in dataclasses.fields(kind):
            if field.name != "data":
                add_setting(settings, field)
    return result


def add_setting(group: argparse._ArgumentGroup, field: dataclasses.Field[object]) -> None:
    """The flag of a setting; it is None where the flag is not given."""
    flag = "--" + field.name.replace("_", "-")
    annotation = str(field.type).removesuffix(" | None")
    shown = "" if field.default is None else f"default: {field.default}"
    if annotation == "bool":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=shown)
    else:
        kind = {"int": int, "float": float, "str": str}[annotation]
        group.add_argument(flag, type=kind, metavar=annotation, help=shown)


def run(options: argparse.Namespace) -> None:
    kind = EXPERIMENTS[options.experiment]
    for name in ("seeds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name}: must be at least 1, got {value}")
    out = options.out or Path("runs") / f"{options.experiment}-{Path(options.data).stem}"
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise InputError(f"{out}: no folder can be written there")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    names = [field.name for field in dataclasses.fields(kind) if field.name != "data"]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    experiment = kind.on(options.data, **given)
    call = {
        "seeds": range(options.seed, options.seed + options.seeds),
        "time_limit": options.time_limit,
        "progress": not options.quiet,
    }
    if isinstance(experiment, Paper):
        run_paper(experiment, out, **call)
    else:
        run_table(experiment, out, **call)


if __name__ == "__main__":
    sys.exit(main())
