"""`fisherkern reproduce`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fisherkern.cli.common import command, out_folder
from fisherkern.cli.options import add_flag
from fisherkern.errors import InputError
from fisherkern.experiments import (
    MEMBERS,
    TABLES,
    Paper,
    Story,
    run,
    run_paper,
    run_table,
)

# Settings that have a flag of another form, or none.
LEFT_OUT = ("data", "seed", "members")


def add_reproduce(commands: Any) -> None:
    parser = command(commands, "reproduce", _reproduce, "an experiment on real data")
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--members", choices=MEMBERS, help="of merge")
    parser.add_argument("--seeds", type=int, help="not of merge: how many, from --seed on (1)")
    parser.add_argument(
        "--time-limit", type=float, metavar="MIN", help="not of merge: stop then, to go on later"
    )
    group = parser.add_argument_group(
        "settings", "with the default in each experiment that has it; some differ on beauty"
    )
    for name, field in _settings().items():
        add_flag(group, name, str(field.type), None, help=_defaults(name))


EXPERIMENTS: dict[str, Any] = {"merge": Story, "paper": Paper, **TABLES}


def _settings() -> dict[str, dataclasses.Field[Any]]:
    """The settings of all experiments by name."""
    return {
        field.name: field
        for experiment in EXPERIMENTS.values()
        for field in dataclasses.fields(experiment)
        if field.name not in LEFT_OUT
    }


def _defaults(name: str) -> str:
    """Like "merge 64, table1 64"."""
    fields = {
        experiment: {field.name: field for field in dataclasses.fields(kind)}
        for experiment, kind in EXPERIMENTS.items()
    }
    found = {e: own[name].default for e, own in fields.items() if name in own}
    return ", ".join(e if default is None else f"{e} {default}" for e, default in found.items())


def _reproduce(options: argparse.Namespace) -> None:
    if options.data is None:
        raise InputError("--data: name a data set (ml-1m, beauty) or a file")
    given = {name: getattr(options, name) for name in _settings()}
    given = {name: value for name, value in given.items() if value is not None}
    if options.members is not None:
        given["members"] = options.members
    if options.experiment == "merge":
        _merge(options, given)
        return
    kind = EXPERIMENTS[options.experiment]
    _check(options.experiment, kind, given)
    seeds = 1 if options.seeds is None else options.seeds
    if seeds < 1:
        raise InputError(f"--seeds: must be at least 1, got {seeds}")
    whole = run_paper if kind is Paper else run_table
    whole(
        kind.on(options.data, **given),
        out_folder(options, f"{options.experiment}-{Path(options.data).stem}"),
        seeds=range(options.seed, options.seed + seeds),
        time_limit=options.time_limit,
        progress=not options.quiet,
    )


def _merge(options: argparse.Namespace, given: dict[str, Any]) -> None:
    for name in ("seeds", "time_limit"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    _check("merge", Story, given)
    story = Story(data=options.data, seed=options.seed, **given)
    default = f"merge-{Path(options.data).stem}-{story.members}-{story.seed}"
    run(story, out_folder(options, default), progress=not options.quiet)


def _check(experiment: str, kind: Any, given: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(kind)}
    for name in given:
        if name not in known:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: the experiment {experiment} has no such setting")
