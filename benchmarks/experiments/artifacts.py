"""Models, Fishers, reports and JSON values of one seed, as files that are made once."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.experiments.reports import load_reports, save_reports
from fisherkern import merge
from fisherkern.data import SequenceDataset
from fisherkern.data.batching import evenly_spread
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.evaluation import Report, evaluate
from fisherkern.files import read_json, write_json
from fisherkern.fisher import DiagFisher, diag_fisher
from fisherkern.fisher.second_moments import fisher_of_moments
from fisherkern.objectives import Objective
from fisherkern.training import load_model, save_model, train, train_peers
from fisherkern.training.state import read_moments

EncoderT = TypeVar("EncoderT", bound=SequenceEncoder)

CPU = torch.device("cpu")


class OutOfTime(Exception):
    """The time given to a call is up; everything made so far is in files."""


def claim_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, all that the results depend on, or check the one that is there.

    Raises InputError if the folder holds a run with another config.
    """
    path = folder / "config.json"
    if not path.exists():
        write_json(path, dict(config))
    elif (stored := read_json(path)) != dict(config):
        keys = sorted({*stored, *config})
        differing = ", ".join(key for key in keys if stored.get(key) != config.get(key))
        raise InputError(
            f"{path}: holds a run with other settings ({differing}); choose another --out"
        )


class ArtifactCache:
    """Make the models, Fishers and reports of one seed, each once, and keep them in a folder.

    An artifact whose file exists is read instead of made. A row and its model have one name, so
    that the training log and the merge report of a row are found. Once the clock passes `end`
    (of time.monotonic; None: never), long work raises OutOfTime instead of starting.

    Models are handed out on the CPU; trainings, Fishers and evaluations run on `device`.
    """

    def __init__(
        self,
        data: SequenceDataset,
        folder: Path,
        seed: int,
        given_base: SequenceEncoder | None = None,
        end: float | None = None,
        validation_users: int = 2000,
        progress: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self.data, self.folder, self.seed, self.device = data, folder, seed, device
        self.given_base, self.end, self.progress = given_base, end, progress
        self.num_made = 0  # reports and JSON values that were not stored before
        self.users = self.spread_users(validation_users)

    def spread_users(self, count: int) -> NDArray[np.int64]:
        """(min(count, num_users),) int64: users evenly spread over all of them."""
        return evenly_spread(self.data.num_users, count)

    def artifact_name(self, name: str) -> str:
        """The file name, without suffix, of the artifact `name`."""
        return f"seed-{self.seed}/{re.sub('[^a-z0-9.]+', '-', name.lower()).strip('-')}"

    def path(self, name: str, ending: str) -> Path:
        """The path of an artifact's file; ending: like ".safetensors"."""
        return self.folder / f"{self.artifact_name(name)}{ending}"

    def check_time(self) -> None:
        """Raise OutOfTime if the time is up."""
        if self.end is not None and time.monotonic() >= self.end:
            raise OutOfTime

    def log(self, message: str) -> None:
        if self.progress:
            print(f"- seed {self.seed}: {message}", file=sys.stderr, flush=True)

    def fresh(self, encoder: type[EncoderT], *, offset: int = 0, **arguments: Any) -> EncoderT:
        """A new encoder over the data's items, initialised from the seed plus `offset`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + offset)
            return encoder(self.data.num_items, **arguments)

    def model(self, name: str, build: Callable[[], SequenceEncoder]) -> SequenceEncoder:
        """The stored model `name`; built and saved, with its merge report, when absent."""
        path = self.path(name, ".safetensors")
        if not path.exists():
            self.check_time()
            self.log(name)
            model = build()
            report = getattr(model, "merge_report", None)
            save_model(model, path, extra={} if report is None else {"merge_report": report})
        return load_model(path)

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

        The state is saved after every epoch, and a run that was stopped goes on from there. On a
        GPU, where an epoch takes less time than saving, it is saved after every fiftieth.
        """
        on_gpu = self.device.type == "cuda"

        def run(state: Path) -> tuple[SequenceEncoder, dict[str, Any]]:
            model = copy.deepcopy(start()).to(self.device)
            timed: Any = _TimedData(self.data if data is None else data, self.check_time)
            settings.setdefault("save_every", 50 if on_gpu else 1)
            with tf32(on_gpu):
                log = train(
                    model,
                    timed,
                    objective=objective,
                    state=state,
                    progress=self.progress,
                    **settings,
                )
            model.to(CPU)
            about = {"epochs": len(log.losses), "losses": log.losses, "scores": log.scores}
            optimizer, moments = read_moments(state, model)
            DiagFisher(*fisher_of_moments(moments, optimizer, model)).save(self.free_path(name))
            if on_gpu:
                about["device"] = f"{torch.cuda.get_device_name(self.device)}, TF32"
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
            timed: Any = _TimedData(self.data, self.check_time)
            first, second = start()
            log = train_peers(
                first.to(self.device),
                second.to(self.device),
                timed,
                objective=objective,
                state=state,
                progress=self.progress,
                **settings,
            )
            about = {"epochs": len(log.losses[0]), "losses": log.losses, "scores": log.scores}
            return log.model.to(CPU), {**about, "best_epoch": log.best_epoch, "peer": log.peer}

        return self._trained(name, run)

    def _trained(
        self, name: str, run: Callable[[Path], tuple[SequenceEncoder, dict[str, Any]]]
    ) -> SequenceEncoder:
        """The stored model `name`; run(state): the model and its training log."""
        state = self.path(name, ".state.safetensors")

        def build() -> SequenceEncoder:
            model, log = run(state)
            # First the log, so that a model never is without it.
            write_json(self.path(name, ".training.json"), log)
            return model

        model = self.model(name, build)
        state.unlink(missing_ok=True)
        return model

    def fisher(
        self,
        name: str,
        build: Callable[[], SequenceEncoder],
        *,
        sequences: int,
        data: SequenceDataset | None = None,
        **arguments: Any,
    ) -> DiagFisher:
        """The stored Fisher `name` of the model built, on up to `sequences` training pairs."""
        path = self.path(name, ".fisher.safetensors")
        if not path.exists():
            self.check_time()
            self.log(f"Fisher of {name}")
            source, model = self.data if data is None else data, build().to(self.device)
            count = min(sequences, source.num_users)
            loader = source.loader(split="train", max_len=model.max_len, limit=count)
            batches = [{k: v.to(self.device) for k, v in batch.items()} for batch in loader]
            fisher = diag_fisher(
                model, batches, seed=self.seed, progress=self.progress, **arguments
            )
            model.to(CPU)
            fisher.save(path)
        return DiagFisher.load(path)

    def free_path(self, name: str) -> Path:
        """Where the training of the model `name` leaves its optimiser's second moments."""
        return self.path(f"{name}, optimizer", ".fisher.safetensors")

    def free_fisher(self, name: str) -> DiagFisher:
        """The second moments that the training of the model `name` left."""
        return DiagFisher.load(self.free_path(name))

    def merged(
        self, name: str, members: Sequence[SequenceEncoder], **arguments: Any
    ) -> SequenceEncoder:
        """The stored merge `name` of the members."""
        return self.model(name, lambda: merge(members, **arguments))

    def score(self, model: nn.Module, users: NDArray[np.int64] | None = None) -> float:
        """NDCG@10 on the validation items of `users`, by default those that choices are made by."""
        users = self.users if users is None else users
        return evaluate(model, self.data, split="validation", k=(10,), users=users)["ndcg@10"]

    def row_reports(self, row: str, build: Callable[[], nn.Module]) -> tuple[Report, Report]:
        """The row's validation and test reports on all users, evaluated when absent."""
        splits = {split: {"split": split} for split in ("validation", "test")}
        reports = self.reports("reports", row, build, splits)
        return reports["validation"], reports["test"]

    def reports(
        self,
        kind: str,
        row: str,
        build: Callable[[], nn.Module],
        protocols: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Report]:
        """The row's stored reports of one kind by name, made when absent.

        protocols: name -> arguments of `evaluate`.
        """
        path = self.path(row, f".{kind}.safetensors")
        if not path.exists():
            self.check_time()
            model = build().to(self.device)
            self.check_time()
            self.log(f"evaluating {row}")
            reports = {
                name: evaluate(model, self.data, progress=self.progress, **protocol)
                for name, protocol in protocols.items()
            }
            model.to(CPU)
            save_reports(path, reports)
            self.num_made += 1
        return load_reports(path)

    def json(self, name: str, kind: str, build: Callable[[], Any]) -> Any:
        """The stored JSON value `name`.`kind`.json, computed when absent."""
        path = self.path(name, f".{kind}.json")
        if not path.exists():
            self.check_time()
            self.log(f"{kind} of {name}")
            write_json(path, build())
            self.num_made += 1
        return read_json(path)

    def about(self, row: str) -> dict[str, Any]:
        """How the row's model was trained or merged, as far as it was."""
        about: dict[str, Any] = {}
        training, model = self.path(row, ".training.json"), self.path(row, ".json")
        if training.exists():
            log = read_json(training)
            about |= {name: log[name] for name in ("epochs", "best_epoch")}
        if model.exists():
            report = read_json(model)["extra"].get("merge_report")
            if report is not None:
                about["weights"] = report["weights"]
        return about


@contextlib.contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Let a GPU's products of float32 matrices round their factors to TF32, where `enabled`."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if enabled else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _TimedData:
    """A data set whose epochs begin only while there is time.

    `train` asks for an epoch's windows right after it has saved the one before.
    """

    def __init__(self, data: SequenceDataset, check_time: Callable[[], None]) -> None:
        self._data, self._check_time = data, check_time

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def windows(self, **arguments: Any) -> Any:
        self._check_time()
        return self._data.windows(**arguments)
