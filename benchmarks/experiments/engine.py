"""Run an experiment: every model is a file, every row is written as soon as it is known."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.experiments.artifacts import CPU, ArtifactCache, OutOfTime, claim_folder
from benchmarks.experiments.experiment import Experiment, RowBuilders
from benchmarks.experiments.figures import draw_figures
from benchmarks.experiments.tables import (
    INTERVAL,
    METRIC,
    comparison_rows,
    comparison_table,
    mean_reports,
)
from fisherkern.data import SequenceDataset, load
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError, shown
from fisherkern.evaluation import Report
from fisherkern.files import atomic_path, write_json
from fisherkern.fingerprint import fingerprint


def run_table(
    experiment: Experiment,
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    time_limit: float | None = None,
    progress: bool = True,
    device: torch.device = CPU,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Make the rows that `out` lacks, for `time_limit` minutes; the content of result.json.

    Both result.json and table.md are written after every row and name what is missing; the
    figures are of the first seed. A training stops at the end of the epoch in which the time ran
    out, and the next call goes on from there; a call with nothing to do writes the same bytes
    again. More seeds may be asked for later. Of the rows, `only` these are made, where it names
    some: several calls may each make some of one folder's. Raises InputError if `out` holds a run
    with other settings, and for a negative limit or a row that is not there.
    """
    end = deadline(time_limit)
    data = load(experiment.data)
    config, caches = open_caches(
        experiment, data, out, seeds=seeds, end=end, progress=progress, device=device, only=only
    )
    table = ResultTable(experiment, config, caches, only)
    figures = experiment.figures(caches[0])
    for cache in caches:
        table.fill(cache, lambda: table.write(out))
        if cache is caches[0]:
            table.missing_figures = draw_figures(figures, out)
    result = table.write(out)
    print(table.text(result))
    print(f"written to {out}: result.json, table.md{', figures' * bool(figures)}")
    if result["missing"] and not only:
        print_time_is_up()
    return result


def deadline(time_limit: float | None) -> float | None:
    """When `time_limit` minutes from now are over, by time.monotonic()."""
    if time_limit is not None and not time_limit >= 0:
        raise InputError(f"time_limit: must not be negative, got {time_limit}")
    return None if time_limit is None else time.monotonic() + 60 * time_limit


def print_time_is_up() -> None:
    print("the time is up: the same command goes on from here", file=sys.stderr)


def config_of(
    experiment: Experiment, data: SequenceDataset, base: SequenceEncoder | None
) -> dict[str, Any]:
    """All that the results depend on."""
    settings: dict[str, Any] = dataclasses.asdict(experiment)
    if base is not None:  # its content counts, not its path; its sizes replace the settings
        settings |= sizes_of(base, experiment)
        settings["base"] = f"{type(base).__name__} {fingerprint(base)}"
    return {"experiment": experiment.name(), **settings, "data_fingerprint": data.fingerprint()}


def sizes_of(base: SequenceEncoder, experiment: Experiment) -> dict[str, Any]:
    """The experiment's sizes as the base has them."""
    return {name: base.config[name] for name in experiment.sizes() if name in base.config}


def open_caches(
    experiment: Experiment,
    data: SequenceDataset,
    out: Path,
    *,
    seeds: Sequence[int],
    end: float | None,
    progress: bool,
    device: torch.device = CPU,
    only: Sequence[str] = (),
) -> tuple[dict[str, Any], list[ArtifactCache]]:
    """The content of config.json, and a cache for every seed, in the folder `out`."""
    base = experiment.load_base(data)
    config = config_of(experiment, data, base)
    users = experiment.validation_users
    caches = [ArtifactCache(data, out, seed, base, end, users, progress, device) for seed in seeds]
    rows = list(experiment.rows(caches[0])) if only else []
    for name in only:
        if name not in rows:
            raise InputError(f"--rows: no row {shown(name)}; there are {'; '.join(rows)}")
    claim_folder(out, config)
    return config, caches


def settings_line(config: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in config.items() if name != "data_fingerprint"}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


# The reports of a row by name, "validation" and "test" among them, and its other content.
RowResult = tuple[Mapping[str, Report], Mapping[str, Any]]


def keep_metrics(report: Report, *metrics: str) -> Report:
    """The report with these metrics alone: many whole reports at once take much memory."""
    return dataclasses.replace(report, per_user={name: report.per_user[name] for name in metrics})


class ResultTable:
    """The rows of all seeds, as far as they are known; a subclass shows them in another way."""

    def __init__(
        self,
        experiment: Experiment,
        config: Mapping[str, Any],
        caches: Sequence[ArtifactCache],
        only: Sequence[str] = (),
    ) -> None:
        self.experiment, self.config, self.only = experiment, config, only
        self.missing_figures: list[str] = []
        # Seed -> row -> its result. The rows of all seeds stand there from the start.
        self.rows: dict[int, dict[str, RowResult | None]] = {
            cache.seed: dict.fromkeys(self.row_builders(cache)) for cache in caches
        }

    def row_builders(self, cache: ArtifactCache) -> RowBuilders:
        """The rows and the builders of their models."""
        return self.experiment.rows(cache)

    def report_row(
        self, cache: ArtifactCache, row: str, build: Callable[[], nn.Module]
    ) -> RowResult:
        """Evaluate a row's model, where that is not stored."""
        validation, test = cache.row_reports(row, build)
        validation = keep_metrics(validation, METRIC)
        content: dict[str, Any] = {"about": cache.about(row)}
        compute = self.experiment.extra_columns(cache).get(row)
        if compute is not None:
            content["columns"] = cache.json(row, "numbers", compute)
        return {"validation": validation, "test": test}, content

    def compare_rows(self, reports: Mapping[str, Mapping[str, Report]]) -> list[dict[str, Any]]:
        """The JSON rows of the models that there are reports of, in that order."""
        experiment = self.experiment
        rows: dict[str, dict[str, Any]] = {}
        for suffix in dict.fromkeys(map(experiment.suffix, reports)):
            group = {
                name: (by["validation"], by["test"])
                for name, by in reports.items()
                if experiment.suffix(name) == suffix
            }
            references = {
                title: [name + suffix for name in names]
                for title, names in experiment.references().items()
            }
            ensemble = None if experiment.ENSEMBLE is None else experiment.ENSEMBLE + suffix
            rows |= {row["model"]: row for row in comparison_rows(group, references, ensemble)}
        return [rows[name] for name in reports]

    def markdown(self, rows: Sequence[Mapping[str, Any]], paper: Mapping[str, str]) -> str:
        """`compare_rows`'s rows as a table."""
        return comparison_table(rows, list(self.experiment.references()), paper)

    def paper(self) -> tuple[Mapping[str, str], str]:
        """A paper's numbers by row, and a note on them and on the table."""
        return self.experiment.paper()

    def fill(self, cache: ArtifactCache, done: Callable[[], Any]) -> None:
        """Make a seed's rows while there is time, calling `done` after each that was not stored."""
        for row, build in self.row_builders(cache).items():
            stored = cache.path(row, ".reports.safetensors").exists()  # by another call
            if self.only and row not in self.only and not stored:
                continue
            before = cache.num_made
            try:
                self.rows[cache.seed][row] = self.report_row(cache, row, build)
            except OutOfTime:
                continue
            if cache.num_made > before:
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
            "missing": self.missing(),
            "paper": dict(self.paper()[0]),
            "torch": torch.__version__,
        }

    def missing(self) -> dict[str, list[str]]:
        """Seed -> the rows that it lacks; "pictures" -> the figures not drawn."""
        missing = {
            str(seed): [name for name, result in rows.items() if result is None]
            for seed, rows in self.rows.items()
            if None in rows.values()
        }
        return {**missing, **({"pictures": self.missing_figures} if self.missing_figures else {})}

    def seed_rows(self, seed: int) -> list[dict[str, Any]]:
        """The JSON rows of one seed."""
        results = {name: row for name, row in self.rows[seed].items() if row is not None}
        rows = self.compare_rows({name: reports for name, (reports, _) in results.items()})
        for row in rows:
            row |= results[row["model"]][1] if row["model"] in results else {}
        return rows

    def means(self) -> list[dict[str, Any]]:
        """The rows of the reports averaged over the seeds, and the averages of other columns."""
        shared: dict[str, list[RowResult]] = {}
        for name in next(iter(self.rows.values())):
            results = [result for rows in self.rows.values() if (result := rows[name]) is not None]
            if len(results) == len(self.rows):
                shared[name] = results
        means = self.compare_rows(
            {
                name: {
                    kind: mean_reports([reports[kind] for reports, _ in results])
                    for kind in results[0][0]
                }
                for name, results in shared.items()
            }
        )
        for row in means:
            results = shared.get(row["model"], [])
            columns = [content["columns"] for _, content in results if "columns" in content]
            if columns:
                row["columns"] = {
                    title: sum(values[title] for values in columns) / len(columns)
                    for title in columns[0]
                }
        return means

    def text(self, result: Mapping[str, Any]) -> str:
        """The tables in Markdown, under the settings and the protocol."""
        parts = [settings_line(self.config)]
        if result["protocol"] is not None:
            parts.append(f"{result['protocol']}; {INTERVAL}")
        for table in result["tables"]:
            parts += self.section_of(table, result)
        parts += missing_lines(result)
        return "\n\n".join([*parts, *filter(None, [self.paper()[1]])])

    def section_of(self, table: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
        """One of the result's tables, with the seed before it where there are several."""
        parts = []
        if len(result["seeds"]) > 1:
            mean = table["seed"] == "mean"
            parts.append("mean over the seeds" if mean else f"seed {table['seed']}")
        if table["rows"]:
            parts.append(self.markdown(table["rows"], result["paper"]))
        return parts


def missing_lines(result: Mapping[str, Any]) -> list[str]:
    """A line for each seed that lacks rows, and for the figures not drawn."""
    return [
        f"not there yet, {'' if key == 'pictures' else 'seed '}{key}: {'; '.join(names)}"
        for key, names in result["missing"].items()
    ]
