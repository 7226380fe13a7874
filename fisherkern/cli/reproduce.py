"""`fisherkern reproduce`."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from fisherkern.cli.arguments import command
from fisherkern.cli.run import Run
from fisherkern.errors import InputError
from fisherkern.experiments import MEMBERS, TABLES, Paper, Story, run_paper, run_table
from fisherkern.experiments import run as run_story

# Settings that have a flag of another form, or none.
LEFT_OUT = ("data", "seed", "members")
EXPERIMENTS: dict[str, Any] = {"merge": Story, "paper": Paper, **TABLES}


def _settings() -> dict[str, inspect.Parameter]:
    """The settings of all experiments by name, each with its experiments' default."""
    return {
        name: parameter.replace(default=None, annotation=parameter.annotation | None)
        for experiment in EXPERIMENTS.values()
        for name, parameter in inspect.signature(experiment, eval_str=True).parameters.items()
        if name not in LEFT_OUT
    }


@command(
    "reproduce",
    choices={"experiment": EXPERIMENTS, "members": MEMBERS},
    more={"Settings (each experiment has its own defaults)": _settings()},
)
def reproduce(
    run: Run,
    experiment: str,
    *,
    members: str | None = None,
    seeds: int | None = None,
    time_limit: float | None = None,
) -> None:
    """Run an experiment on real data.

    Args:
        experiment: its name.
        members: of merge.
        seeds: how many, from --seed on (default: 1); not for merge.
        time_limit: stop after this many minutes; rerun to resume (not for merge).
    """
    data = run.values["data"]
    if data is None:
        raise InputError("--data: name a data set (ml-1m, beauty) or a file")
    given = {name: run.values[name] for name in [*_settings(), "members"]}
    given = {name: value for name, value in given.items() if value is not None}
    if experiment == "merge":
        others = {"seeds": seeds, "time_limit": time_limit}
        given |= {name: value for name, value in others.items() if value is not None}
        _check("merge", Story, given)
        story = Story(data=data, seed=run.seed, **given)
        default = f"merge-{Path(data).stem}-{story.members}-{story.seed}"
        run_story(story, run.out(default), progress=run.progress)
        return
    kind = EXPERIMENTS[experiment]
    _check(experiment, kind, given)
    count = 1 if seeds is None else seeds
    if count < 1:
        raise InputError(f"--seeds: must be at least 1, got {count}")
    whole = run_paper if kind is Paper else run_table
    whole(
        kind.on(data, **given),
        run.out(f"{experiment}-{Path(data).stem}"),
        seeds=range(run.seed, run.seed + count),
        time_limit=time_limit,
        progress=run.progress,
    )


def _check(experiment: str, kind: Any, given: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(kind)}
    for name in given:
        if name not in known:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: the experiment {experiment} has no such setting")
