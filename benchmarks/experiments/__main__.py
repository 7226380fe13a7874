"""The papers' experiments: python -m benchmarks.experiments table2 --data ml-1m --time-limit 60

Run it from the root of the checkout. A call goes on from what the folder --out holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.experiments import EXPERIMENTS, TABLES, Experiment, Paper, run_paper, run_table
from fisherkern.checks import device_named
from fisherkern.errors import InputError

NOTE = "some defaults are others on beauty"
# A setting in the "Args:" of a docstring, with the lines that go on from it.
SETTING = re.compile(r"^        (\w+): (.*(?:\n {12}.*)*)", re.MULTILINE)


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
        summary = str(kind.__doc__).partition("\n\n    Args:")[0]
        command = names.add_parser(
            name,
            help=summary.partition("\n")[0],
            description=summary,
            allow_abbrev=False,
        )
        command.add_argument("--data", required=True, help="a data set (ml-1m, beauty) or a file")
        command.add_argument("--out", type=Path, help="folder of the results (default: runs/...)")
        command.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
        command.add_argument("--seeds", type=int, default=1, help="number of seeds (default: 1)")
        command.add_argument(
            "--time-limit", type=float, metavar="MIN", help="stop after this; rerun to go on"
        )
        command.add_argument("--threads", type=int, help="CPU threads")
        if name in TABLES:
            text = "where models are trained and ranked: cpu, cuda or cuda:1 (default: cpu)"
            command.add_argument("--device", default="cpu", help=text)
            command.add_argument(
                "--rows", nargs="+", default=(), metavar="ROW", help="make these rows alone"
            )
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        settings, texts = command.add_argument_group("settings", NOTE), setting_texts(kind)
        for field in dataclasses.fields(kind):
            if field.name != "data":
                add_setting(settings, field, texts[field.name])
    return result


def setting_texts(kind: type[Experiment]) -> dict[str, str]:
    """What the docstrings of an experiment and its bases say of each setting."""
    texts: dict[str, str] = {}
    for base in kind.__mro__:
        for name, text in SETTING.findall(str(base.__doc__)):
            texts.setdefault(name, " ".join(text.split()))
    return texts


def add_setting(
    group: argparse._ArgumentGroup, field: dataclasses.Field[object], text: str
) -> None:
    """The flag of a setting; it is None where the flag is not given."""
    flag = "--" + field.name.replace("_", "-")
    annotation = str(field.type).removesuffix(" | None")
    default = "" if field.default is None else f" (default: {field.default})"
    text = text.removesuffix(".").replace("%", "%%") + default
    if annotation == "bool":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        kind = {"int": int, "float": float, "str": str}[annotation]
        group.add_argument(flag, type=kind, metavar=annotation, help=text)


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
        device = device_named(options.device)
        run_table(experiment, out, **call, device=device, only=options.rows)


if __name__ == "__main__":
    sys.exit(main())
