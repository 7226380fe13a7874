"""Tables made in pieces: every model is a file, every row is written as soon as it is known."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from fisherkern.data import SequenceDataset, load
from fisherkern.encoders import BERT4Rec, SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.evaluation import Report
from fisherkern.experiments.lab import Entry, Lab, OutOfTime
from fisherkern.experiments.tables import INTERVAL, comparison_rows, comparison_table, mean_reports
from fisherkern.experiments.workspace import Workspace
from fisherkern.files import atomic_path, write_json
from fisherkern.fingerprint import fingerprint
from fisherkern.objectives import Objective
from fisherkern.training import load_model

Self = TypeVar("Self", bound="Experiment")

# Whole numbers that may be 0; the others are at least 1.
MAY_BE_ZERO = ("warmup_steps", "base_epochs", "extra_epochs")

# What BERT4Rec takes on Amazon Beauty: short sequences, three times the items.
BEAUTY: Mapping[str, Any] = {
    "max_len": 20,
    "dropout": 0.3,
    "mask_ratio": 0.4,
    "batch_size": 128,
    "lr": 1e-3,
}

# A row's name -> what makes its model, called where its report is not stored yet.
Rows = dict[str, Callable[[], nn.Module]]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Every setting of a table; a subclass says which rows it has and what they are held against.

    data: what `load` takes. base: a model file to start from where the rows do. validation_users:
    users of the validation score that a choice is made by, evenly spread.
    """

    data: str
    base: str | None = None
    max_len: int = 50
    dim: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.1
    batch_size: int = 64
    lr: float = 3e-3
    warmup_steps: int = 100
    crop: str = "random"
    validation_users: int = 2000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name not in MAY_BE_ZERO)
            if isinstance(value, int) and value < least:
                raise InputError(f"{field.name}: must be at least {least}, got {value}")

    #: Fields that differ from the defaults above on a data set, by its name.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: The row of whose gain over the first reference the others' shares are given.
    ENSEMBLE: ClassVar[str | None] = None
    #: What a paper reports on ML-1M, by row, and what to know of it; shown for that data alone.
    PAPER: ClassVar[Mapping[str, str]] = {}
    NOTE: ClassVar[str] = ""

    @classmethod
    def on(cls: type[Self], data: str, **given: Any) -> Self:
        """The settings for a data set: those given, else its presets, else the defaults.

        Raises InputError for a setting that the experiment does not have.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in given:
            if name not in known:
                raise InputError(f"{name}: {cls.__name__.lower()} has no such setting")
        return cls(**{**cls.PRESETS.get(Path(data).stem, {}), **given, "data": data})

    def paper(self) -> tuple[Mapping[str, str], str]:
        """What a paper reports on these data, by row, and what to know of it."""
        return (self.PAPER, self.NOTE) if Path(self.data).stem == "ml-1m" else ({}, "")

    def rows(self, lab: Lab) -> Rows:
        """The rows in the order in which they are made and shown."""
        raise NotImplementedError

    def references(self) -> dict[str, Sequence[str]]:
        """A column's title -> the rows of which the best on validation is what it compares with.

        The first column's reference, where it is chosen, is marked in the table.
        """
        raise NotImplementedError

    def sizes(self) -> dict[str, Any]:
        """The arguments of a Transformer encoder."""
        names = ("max_len", "dim", "layers", "heads", "dropout")
        return {name: getattr(self, name) for name in names}

    def untrained(self, lab: Lab, *, offset: int = 0) -> SequenceEncoder:
        """The encoder that a base, or a member from scratch, starts as."""
        return lab.fresh(BERT4Rec, offset=offset, **self.sizes())

    def training(self) -> dict[str, Any]:
        """The arguments of `Lab.train` that all models share."""
        names = ("batch_size", "lr", "warmup_steps", "crop")
        return {name: getattr(self, name) for name in names}

    def common_base(self, lab: Lab, objective: Objective, epochs: int) -> SequenceEncoder:
        """The model that members start from: the file `base`, else one trained at a constant rate.

        It bears the row name "base".
        """
        if lab.given_base is not None:
            return lab.given_base
        settings = {"epochs": epochs, "seed": lab.seed, **self.training()}
        return lab.train("base", lambda: self.untrained(lab), objective, **settings)

    def given_base(self, data: SequenceDataset) -> SequenceEncoder | None:
        """The model of the file `base`, checked against the data."""
        if self.base is None:
            return None
        model = load_model(Path(self.base))
        if model.item_ids is None or list(model.item_ids) != list(data.item_ids):
            raise InputError(f"base: the catalogue of {self.base} is not that of {data.name}")
        return model


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
    if time_limit is not None and not time_limit >= 0:
        raise InputError(f"time_limit: must not be negative, got {time_limit}")
    end = None if time_limit is None else time.monotonic() + 60 * time_limit
    data = load(experiment.data)
    base = experiment.given_base(data)
    settings: dict[str, Any] = dataclasses.asdict(experiment)
    if base is not None:  # the file may be moved, and has sizes of its own
        settings |= {name: base.config[name] for name in experiment.sizes() if name in base.config}
        settings["base"] = f"{type(base).__name__} {fingerprint(base)}"
    name = type(experiment).__name__.lower()
    config = {"experiment": name, **settings, "data_fingerprint": data.fingerprint()}
    space = Workspace(out, config)
    table = _Table(experiment, config, out)
    labs = [
        Lab(data, space, seed, base, end, experiment.validation_users, progress) for seed in seeds
    ]
    for lab in labs:
        table.rows[lab.seed] = dict.fromkeys(experiment.rows(lab))
    for lab in labs:
        for row, make in experiment.rows(lab).items():
            try:
                table.rows[lab.seed][row] = lab.entry(row, make)
            except OutOfTime:
                continue
            table.write()
    result = table.write()
    print(table.text(result))
    print(f"written to {out}: result.json, table.md")
    if result["missing"]:
        print("the time is up: the same command goes on from here", file=sys.stderr)
    return result


class _Table:
    """What is known so far: seed -> row -> (validation, test, about), or None."""

    def __init__(self, experiment: Experiment, config: dict[str, Any], out: Path) -> None:
        self.experiment, self.config, self.out = experiment, config, out
        self.rows: dict[int, dict[str, Entry | None]] = {}

    def write(self) -> dict[str, Any]:
        result = self.result()
        with atomic_path(self.out / "table.md") as path:
            path.write_text(self.text(result) + "\n", encoding="utf-8")
        write_json(self.out / "result.json", result)
        return result

    def result(self) -> dict[str, Any]:
        references, ensemble = self.experiment.references(), self.experiment.ENSEMBLE
        tables: list[dict[str, Any]] = []
        protocol = None
        for seed, rows in self.rows.items():
            known = {name: entry for name, entry in rows.items() if entry is not None}
            reports = {name: entry[:2] for name, entry in known.items()}
            found = comparison_rows(reports, references, ensemble)
            for row in found:
                row["about"] = known[row["model"]][2]
            tables.append({"seed": seed, "rows": found})
            for _, test in reports.values():
                protocol = f"{test.protocol}, {test.num_users:,} users"
        if len(self.rows) > 1:
            means = comparison_rows(self.means(), references, ensemble)
            tables.append({"seed": "mean", "rows": means})
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
            "paper": dict(self.experiment.paper()[0]),
            "torch": torch.__version__,
        }

    def means(self) -> dict[str, tuple[Report, Report]]:
        """The reports averaged over the seeds, of the rows that all seeds have."""
        found = {}
        for name in next(iter(self.rows.values())):
            entries = [entry for rows in self.rows.values() if (entry := rows[name]) is not None]
            if len(entries) == len(self.rows):
                validation, test, _ = zip(*entries, strict=True)
                found[name] = (mean_reports(validation), mean_reports(test))
        return found

    def text(self, result: Mapping[str, Any]) -> str:
        """The tables in Markdown, under the settings and the protocol."""
        titles = list(self.experiment.references())
        shown = {name: value for name, value in self.config.items() if name != "data_fingerprint"}
        parts = [
            ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None),
        ]
        if result["protocol"] is not None:
            parts.append(f"{result['protocol']}; {INTERVAL}")
        for table in result["tables"]:
            if len(result["seeds"]) > 1:
                mean = table["seed"] == "mean"
                parts.append("mean over the seeds" if mean else f"seed {table['seed']}")
            if table["rows"]:
                parts.append(comparison_table(table["rows"], titles, result["paper"]))
        for seed, names in result["missing"].items():
            parts.append(f"not there yet, seed {seed}: {'; '.join(names)}")
        return "\n\n".join([*parts, *filter(None, [self.experiment.paper()[1]])])
