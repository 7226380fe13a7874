"""What the rows of a table are made of: models, Fishers and reports of one seed, made once."""

from __future__ import annotations

import copy
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from fisherkern.data import SequenceDataset
from fisherkern.encoders import SequenceEncoder
from fisherkern.evaluation import Report, evaluate
from fisherkern.experiments.reports import load_reports, save_reports
from fisherkern.experiments.workspace import Workspace
from fisherkern.files import read_json, write_json
from fisherkern.fisher import DiagFisher, diag_fisher
from fisherkern.merging import merge
from fisherkern.objectives import Objective
from fisherkern.training import train, train_peers

EncoderT = TypeVar("EncoderT", bound=SequenceEncoder)

# Validation report, test report, and what is worth knowing of how the model was made.
Entry = tuple[Report, Report, dict[str, Any]]


class OutOfTime(Exception):
    """The time given to a call is up; everything made so far is in files."""


class Lab:
    """Makes models, Fishers and reports for the rows of one seed, and keeps them in the workspace.

    What a row is called its model is called as well, so that its training and its merge
    report are found again. Everything that takes long raises OutOfTime once the clock passes
    `end` (of time.monotonic, None: never) instead of starting.
    """

    def __init__(
        self,
        data: SequenceDataset,
        space: Workspace,
        seed: int,
        given_base: SequenceEncoder | None,
        end: float | None,
        validation_users: int,
        progress: bool,
    ) -> None:
        self.data, self.space, self.seed = data, space, seed
        self.given_base, self.end, self.progress = given_base, end, progress
        self.made = 0  # reports and JSON values that were not stored before
        total = data.num_users
        spread = np.linspace(0, total - 1, min(validation_users, total)).round()
        self.users = np.unique(spread.astype(np.int64))

    def stage(self, name: str) -> str:
        """The file name, without suffix, of what is called `name`."""
        return f"seed-{self.seed}/{re.sub('[^a-z0-9.]+', '-', name.lower()).strip('-')}"

    def check(self) -> None:
        """Raise OutOfTime if the time is up."""
        if self.end is not None and time.monotonic() >= self.end:
            raise OutOfTime

    def say(self, what: str) -> None:
        if self.progress:
            print(f"- seed {self.seed}: {what}", file=sys.stderr, flush=True)

    def fresh(self, encoder: type[EncoderT], *, offset: int = 0, **arguments: Any) -> EncoderT:
        """A new encoder over the data's items, initialised from the lab's seed plus `offset`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + offset)
            return encoder(self.data.num_items, **arguments)

    def model(self, name: str, build: Callable[[], SequenceEncoder]) -> SequenceEncoder:
        """The stored model `name`, built when absent."""
        stage = self.stage(name)
        if not self.space.path(f"{stage}.safetensors").exists():
            self.check()
            self.say(name)
        return self.space.model(stage, build)

    def train(
        self,
        name: str,
        start: Callable[[], SequenceEncoder],
        objective: Objective,
        *,
        data: SequenceDataset | None = None,
        **settings: Any,
    ) -> SequenceEncoder:
        """The stored model `name`: a copy of what `start` gives, trained; see `train`.

        The state is saved after every epoch, and a run that was stopped goes on from there.
        """

        def run(state: Path) -> tuple[SequenceEncoder, dict[str, Any]]:
            model = copy.deepcopy(start())
            own: Any = _Clocked(self.data if data is None else data, self.check)
            log = train(
                model, own, objective=objective, state=state, progress=self.progress, **settings
            )
            about = {"epochs": len(log.losses), "losses": log.losses, "scores": log.scores}
            return model, {**about, "best_epoch": log.best_epoch}

        return self._trained(name, run)

    def train_peers(
        self,
        name: str,
        start: Callable[[], tuple[SequenceEncoder, SequenceEncoder]],
        objective: Objective,
        **settings: Any,
    ) -> SequenceEncoder:
        """The stored model `name`: the peer kept of the two that `start` gives."""

        def run(state: Path) -> tuple[SequenceEncoder, dict[str, Any]]:
            own: Any = _Clocked(self.data, self.check)
            log = train_peers(
                *start(), own, objective=objective, state=state, progress=self.progress, **settings
            )
            about = {"epochs": len(log.losses[0]), "losses": log.losses, "scores": log.scores}
            return log.model, {**about, "best_epoch": log.best_epoch, "peer": log.peer}

        return self._trained(name, run)

    def _trained(
        self, name: str, run: Callable[[Path], tuple[SequenceEncoder, dict[str, Any]]]
    ) -> SequenceEncoder:
        """The stored model `name`, which `run(state)` gives with what is written of it."""
        state = self.space.path(f"{self.stage(name)}.state.safetensors")

        def build() -> SequenceEncoder:
            model, log = run(state)
            # First the log, so that a model never is without it.
            write_json(self._log(name), log)
            return model

        model = self.model(name, build)
        state.unlink(missing_ok=True)
        return model

    def fisher(
        self,
        name: str,
        make: Callable[[], SequenceEncoder],
        *,
        sequences: int,
        data: SequenceDataset | None = None,
        **how: Any,
    ) -> DiagFisher:
        """The stored Fisher `name` of what `make` gives, on up to `sequences` training pairs."""
        stage = self.stage(name)
        if not self.space.path(f"{stage}.fisher.safetensors").exists():
            self.check()
            self.say(f"Fisher of {name}")

        def build() -> DiagFisher:
            source, model = self.data if data is None else data, make()
            count = min(sequences, source.num_users)
            loader = source.loader(split="train", max_len=model.max_len, limit=count)
            return diag_fisher(model, loader, seed=self.seed, progress=self.progress, **how)

        return self.space.fisher(stage, build)

    def merged(self, name: str, members: Sequence[SequenceEncoder], **how: Any) -> SequenceEncoder:
        """The stored merge `name` of the members."""
        return self.model(name, lambda: merge(members, **how))

    def score(self, model: nn.Module) -> float:
        """NDCG@10 on the validation item of the lab's users: what choices are made by."""
        report = evaluate(model, self.data, split="validation", k=(10,), users=self.users)
        return report["ndcg@10"]

    def entry(self, row: str, make: Callable[[], nn.Module]) -> Entry:
        """The row's reports on all users, evaluated when absent."""
        splits = {split: {"split": split} for split in ("validation", "test")}
        reports = self.reports("reports", row, make, splits)
        return reports["validation"], reports["test"], self.about(row)

    def reports(
        self,
        kind: str,
        row: str,
        make: Callable[[], nn.Module],
        protocols: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Report]:
        """The row's stored reports of one kind by name, made when absent.

        protocols: name -> arguments of `evaluate`.
        """
        path = self.space.path(f"{self.stage(row)}.{kind}.safetensors")
        if not path.exists():
            self.check()
            model = make()
            self.check()
            self.say(f"evaluating {row}")
            found = {
                name: evaluate(model, self.data, progress=self.progress, **how)
                for name, how in protocols.items()
            }
            save_reports(path, found)
            self.made += 1
        return load_reports(path)

    def json(self, name: str, what: str, build: Callable[[], Any]) -> Any:
        """The stored JSON value `name`.`what`.json, computed when absent."""
        stage = f"{self.stage(name)}.{what}"
        if not self.space.path(f"{stage}.json").exists():
            self.check()
            self.say(f"{what} of {name}")
            self.made += 1
        return self.space.json(stage, build)

    def about(self, row: str) -> dict[str, Any]:
        """How the row's model was trained or merged, as far as it was."""
        found: dict[str, Any] = {}
        if self._log(row).exists():
            log = read_json(self._log(row))
            found |= {name: log[name] for name in ("epochs", "best_epoch")}
        if self.space.path(f"{self.stage(row)}.json").exists():
            report = self.space.about(self.stage(row)).get("merge_report")
            if report is not None:
                found["weights"] = report["weights"]
        return found

    def _log(self, name: str) -> Path:
        return self.space.path(f"{self.stage(name)}.training.json")


class _Clocked:
    """A data set whose epochs begin only while there is time.

    `train` asks for an epoch's windows right after it has saved the one before.
    """

    def __init__(self, data: SequenceDataset, check: Callable[[], None]) -> None:
        self._data, self._check = data, check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def windows(self, **arguments: Any) -> Any:
        self._check()
        return self._data.windows(**arguments)
