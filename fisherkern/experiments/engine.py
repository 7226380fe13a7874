"""Tables made in pieces: every model is a file, every row is written as soon as it is known."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fisherkern.data import SequenceDataset, load
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.evaluation import Report
from fisherkern.experiments.experiment import Experiment, Rows
from fisherkern.experiments.lab import Lab, OutOfTime
from fisherkern.experiments.tables import (
    INTERVAL,
    METRIC,
    comparison_rows,
    comparison_table,
    mean_reports,
)
from fisherkern.experiments.workspace import Workspace
from fisherkern.files import atomic_path, write_json
from fisherkern.fingerprint import fingerprint


def run_table(
    experiment: Experiment,
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    time_limit: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Make the rows that `out` lacks, for `time_limit` minutes; the content of result.json.

    Both result.json and table.md are written after every row and name what is missing. A training
    stops at the end of the epoch in which the time ran out, and the next call goes on from
    there; a call with nothing to do writes the same bytes again. More seeds may be asked for
    later. Raises InputError if `out` holds a run with other settings, and for a negative limit.
    """
    end = deadline(time_limit)
    data = load(experiment.data)
    config, labs = open_labs(experiment, data, out, seeds=seeds, end=end, progress=progress)
    table = Table(experiment, config, labs)
    for lab in labs:
        table.fill(lab, lambda: table.write(out))
    result = table.write(out)
    print(table.text(result))
    print(f"written to {out}: result.json, table.md")
    if result["missing"]:
        say_missing()
    return result


def deadline(time_limit: float | None) -> float | None:
    """When `time_limit` minutes from now are over, by time.monotonic()."""
    if time_limit is not None and not time_limit >= 0:
        raise InputError(f"time_limit: must not be negative, got {time_limit}")
    return None if time_limit is None else time.monotonic() + 60 * time_limit


def say_missing() -> None:
    print("the time is up: the same command goes on from here", file=sys.stderr)


def config_of(
    experiment: Experiment, data: SequenceDataset, base: SequenceEncoder | None
) -> dict[str, Any]:
    """All that the results depend on."""
    settings: dict[str, Any] = dataclasses.asdict(experiment)
    if base is not None:  # the file may be moved, and has sizes of its own
        settings |= sizes_of(base, experiment)
        settings["base"] = f"{type(base).__name__} {fingerprint(base)}"
    name = type(experiment).__name__.lower()
    return {"experiment": name, **settings, "data_fingerprint": data.fingerprint()}


def sizes_of(base: SequenceEncoder, experiment: Experiment) -> dict[str, Any]:
    """The experiment's sizes as the base has them."""
    return {name: base.config[name] for name in experiment.sizes() if name in base.config}


def open_labs(
    experiment: Experiment,
    data: SequenceDataset,
    out: Path,
    *,
    seeds: Sequence[int],
    end: float | None,
    progress: bool,
) -> tuple[dict[str, Any], list[Lab]]:
    """The content of config.json, and a lab for every seed, in the folder `out`."""
    base = experiment.given_base(data)
    config = config_of(experiment, data, base)
    space, users = Workspace(out, config), experiment.validation_users
    return config, [Lab(data, space, seed, base, end, users, progress) for seed in seeds]


def settings_line(config: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in config.items() if name != "data_fingerprint"}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


# A row's reports by name, "validation" and "test" among them, and its other content.
Known = tuple[Mapping[str, Report], Mapping[str, Any]]


def only(report: Report, *metrics: str) -> Report:
    """The report without its other metrics, which many reports at once have no room for."""
    return dataclasses.replace(report, per_user={name: report.per_user[name] for name in metrics})


class Table:
    """The rows of some seeds, as far as they are known; what it shows of them is overridable."""

    def __init__(
        self, experiment: Experiment, config: Mapping[str, Any], labs: Sequence[Lab]
    ) -> None:
        self.experiment, self.config = experiment, config
        # Seed -> row -> what is known of it. The rows of all seeds stand there from the start.
        self.rows: dict[int, dict[str, Known | None]] = {
            lab.seed: dict.fromkeys(self.plan(lab)) for lab in labs
        }

    def plan(self, lab: Lab) -> Rows:
        """The rows and what makes their models."""
        return self.experiment.rows(lab)

    def look(self, lab: Lab, row: str, make: Callable[[], nn.Module]) -> Known:
        """What is to be known of a row."""
        validation, test, about = lab.entry(row, make)
        validation = only(validation, METRIC)
        content: dict[str, Any] = {"about": about}
        find = self.experiment.numbers(lab).get(row)
        if find is not None:
            content["columns"] = lab.json(row, "numbers", find)
        return {"validation": validation, "test": test}, content

    def compared(self, reports: Mapping[str, Mapping[str, Report]]) -> list[dict[str, Any]]:
        """The JSON rows of the models that there are reports of, in that order."""
        experiment = self.experiment
        found: dict[str, dict[str, Any]] = {}
        for suffix in dict.fromkeys(map(experiment.suffix, reports)):
            own = {
                name: (by["validation"], by["test"])
                for name, by in reports.items()
                if experiment.suffix(name) == suffix
            }
            references = {
                title: [name + suffix for name in names]
                for title, names in experiment.references().items()
            }
            ensemble = None if experiment.ENSEMBLE is None else experiment.ENSEMBLE + suffix
            found |= {row["model"]: row for row in comparison_rows(own, references, ensemble)}
        return [found[name] for name in reports]

    def markdown(self, rows: Sequence[Mapping[str, Any]], paper: Mapping[str, str]) -> str:
        """`compared`'s rows as a table."""
        return comparison_table(rows, list(self.experiment.references()), paper)

    def paper(self) -> tuple[Mapping[str, str], str]:
        """A paper's figures by row, and what to know of them and of the table."""
        return self.experiment.paper()

    def fill(self, lab: Lab, done: Callable[[], Any]) -> None:
        """Make a seed's rows while there is time, calling `done` after each that was not stored."""
        for row, make in self.plan(lab).items():
            before = lab.made
            try:
                self.rows[lab.seed][row] = self.look(lab, row, make)
            except OutOfTime:
                continue
            if lab.made > before:
                done()

    def write(self, out: Path) -> dict[str, Any]:
        result = self.result()
        with atomic_path(out / "table.md") as path:
            path.write_text(self.text(result) + "\n", encoding="utf-8")
        write_json(out / "result.json", result)
        return result

    def result(self) -> dict[str, Any]:
        tables: list[dict[str, Any]] = []
        protocol = None
        for seed, rows in self.rows.items():
            tables.append({"seed": seed, "rows": self.seed_rows(seed)})
            for reports, _ in filter(None, rows.values()):
                protocol = f"{reports['test'].protocol}, {reports['test'].num_users:,} users"
        if len(self.rows) > 1:
            tables.append({"seed": "mean", "rows": self.means()})
        return {
            "settings": self.config,
            "protocol": protocol,
            "seeds": list(self.rows),
            "tables": tables,
            "missing": {
                str(seed): [name for name, entry in rows.items() if entry is None]
                for seed, rows in self.rows.items()
                if None in rows.values()
            },
            "paper": dict(self.paper()[0]),
            "torch": torch.__version__,
        }

    def seed_rows(self, seed: int) -> list[dict[str, Any]]:
        """The JSON rows of one seed."""
        known = {name: entry for name, entry in self.rows[seed].items() if entry is not None}
        found = self.compared({name: reports for name, (reports, _) in known.items()})
        for row in found:
            row |= known[row["model"]][1] if row["model"] in known else {}
        return found

    def means(self) -> list[dict[str, Any]]:
        """The rows of the reports averaged over the seeds, and the averages of other columns."""
        shared: dict[str, list[Known]] = {}
        for name in next(iter(self.rows.values())):
            entries = [entry for rows in self.rows.values() if (entry := rows[name]) is not None]
            if len(entries) == len(self.rows):
                shared[name] = entries
        found = self.compared(
            {
                name: {kind: mean_reports([by[kind] for by, _ in own]) for kind in own[0][0]}
                for name, own in shared.items()
            }
        )
        for row in found:
            entries = shared.get(row["model"], [])
            columns = [content["columns"] for _, content in entries if "columns" in content]
            if columns:
                row["columns"] = {
                    title: sum(own[title] for own in columns) / len(columns) for title in columns[0]
                }
        return found

    def text(self, result: Mapping[str, Any]) -> str:
        """The tables in Markdown, under the settings and the protocol."""
        parts = [settings_line(self.config)]
        if result["protocol"] is not None:
            parts.append(f"{result['protocol']}; {INTERVAL}")
        for table in result["tables"]:
            parts += self.titled(table, result)
        parts += not_there(result)
        return "\n\n".join([*parts, *filter(None, [self.paper()[1]])])

    def titled(self, table: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
        """One of the result's tables, with the seed before it where there are several."""
        parts = []
        if len(result["seeds"]) > 1:
            mean = table["seed"] == "mean"
            parts.append("mean over the seeds" if mean else f"seed {table['seed']}")
        if table["rows"]:
            parts.append(self.markdown(table["rows"], result["paper"]))
        return parts


def not_there(result: Mapping[str, Any]) -> list[str]:
    """A line per seed that lacks rows."""
    return [
        f"not there yet, seed {seed}: {'; '.join(names)}"
        for seed, names in result["missing"].items()
    ]
