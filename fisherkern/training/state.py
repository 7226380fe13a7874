"""The state file a training run goes on from, whenever it was killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern import processes
from fisherkern.adapters.files.dcp_files import DcpFolder, is_dcp
from fisherkern.adapters.sharded.dcp import load_by_rows, names_dcp, save_dcp
from fisherkern.checks import check_count, check_positive
from fisherkern.errors import InputError, shown
from fisherkern.files import is_file, read_tensors, save_tensors
from fisherkern.fisher.second_moments import Moment
from fisherkern.training.checkpoint import check_stored_tensors

PathLike = str | os.PathLike[str]
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class CheckpointPolicy:
    """Where the state goes (None: nowhere), and after how many epochs, steps or seconds."""

    path: PathLike | None
    every: int
    every_steps: int | None
    every_seconds: float | None

    def __post_init__(self) -> None:
        check_count("save_every", self.every)
        if self.every_steps is not None:
            check_count("save_every_steps", self.every_steps)
        if self.every_seconds is not None:
            check_positive("save_every_seconds", self.every_seconds)

    @property
    def together(self) -> bool:
        """Whether all processes write: a folder x.dcp."""
        return self.path is not None and names_dcp(self.path)

    @property
    def writes(self) -> bool:
        """Whether this process writes: a file is process 0's alone."""
        return self.together or processes.rank() == 0


@dataclasses.dataclass
class TrainProgress:
    """How far a run is.

    step: steps made. losses: mean loss of each whole epoch. batch: steps made in the
    epoch after them. sums: of those steps and each term of the objective, the sum of the losses of
    its targets, and their number. scores: validation score by epoch.
    """

    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    batch: int = 0
    sums: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    scores: dict[int, float] = dataclasses.field(default_factory=dict)

    def add(self, losses: list[float], targets: list[int]) -> None:
        """Add a step's terms, each a mean over so many targets."""
        before = self.sums or [(0.0, 0)] * len(losses)
        self.sums = [
            (total + loss * number, count + number)
            for (total, count), loss, number in zip(before, losses, targets, strict=True)
        ]
        self.step += 1
        self.batch += 1

    def end_epoch(self) -> None:
        """Close an epoch: its loss is the sum of the terms' means over their targets."""
        self.losses.append(sum(total / count for total, count in self.sums if count))
        self.batch, self.sums = 0, []

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with the highest score."""
        return max(self.scores, key=lambda epoch: self.scores[epoch]) if self.scores else None

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether the last `patience` validations brought no new best score."""
        best = self.best_epoch
        if patience is None or best is None:
            return False
        return sum(epoch > best for epoch in self.scores) >= patience

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; `from_json` gives the object back."""
        return dataclasses.asdict(self) | {"scores": list(self.scores.items())}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TrainProgress:
        """Make the object that `to_json` described."""
        sums = [(total, count) for total, count in fields["sums"]]
        return cls(**{**fields, "sums": sums, "scores": dict(fields["scores"])})


@dataclasses.dataclass
class TrainState:
    """Everything tensor-valued that a run changes.

    parts: the modules by name, "model", "objective.NAME" and perhaps "ema". best: their tensors,
    by name, after the best epoch, empty before the first validation.
    """

    parts: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts' tensors, as "model.item_embedding.weight"; a shared one, once."""
        seen: set[tuple[int, torch.Size]] = set()
        found = {}
        for part, module in self.parts.items():
            for name, tensor in module.state_dict().items():
                storage = (tensor.data_ptr(), tensor.shape)
                if storage not in seen or not tensor.numel():
                    seen.add(storage)
                    found[f"{part}.{name}"] = tensor
        return found

    def start(self) -> dict[str, str]:
        """Return a sha256 of each part's weights, which tells a run from one of another start.

        A part that an earlier call in this process left as it is, by an interrupt or at its end,
        has the start of that call: whoever calls again with the same objects goes on.
        """
        found = {}
        for part, own in self.parts.items():
            if part != "ema":
                now = _sha256(own)
                left, first = _starts.get(own, (now, now))
                found[part] = first if left == now else now
        return found

    def leave(self, start: Mapping[str, str]) -> None:
        """Remember for `start` what the parts that began as that are now."""
        for part, first in start.items():
            _starts[self.parts[part]] = _sha256(self.parts[part]), first

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what the optimiser moves, by the names of `tensors`; a shared one, once."""
        seen: set[nn.Parameter] = set()
        found = {}
        for part, module in self.parts.items():
            for name, parameter in module.named_parameters():
                if part != "ema" and parameter.requires_grad and parameter not in seen:
                    seen.add(parameter)
                    found[f"{part}.{name}"] = parameter
        return found

    def keep_best(self) -> None:
        """Copy the tensors as they are to `best`."""
        self.best = {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put `best`, where there is one, back into the parts."""
        own = self.tensors()
        for name, tensor in self.best.items():
            own[name].copy_(tensor)


# By module: its weights when a call left it, and when its run began; see `TrainState.start`. A copy
# of a trained model begins a run of its own, in this process as in the next.
_starts: weakref.WeakKeyDictionary[nn.Module, tuple[str, str]] = weakref.WeakKeyDictionary()


def _sha256(module: nn.Module) -> str:
    """Return the sha256 of a module's state: names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def save_state(
    path: PathLike, state: TrainState, progress: TrainProgress, run: Mapping[str, Any]
) -> None:
    """Write all that `load_state` needs to go on; `run` says, in JSON values, what run it is."""
    about = {"kind": "training", "run": run, "progress": progress.to_json()}
    write_state(path, contents(state), about)


def write_state(path: PathLike, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write the tensors and the header of a run to a file or a folder.

    No clock time is in the file: the same run gives the same bytes. A folder x.dcp is written by
    all processes, each of which has the same.
    """
    save = save_dcp if names_dcp(path) else save_tensors
    save(path, tensors, about)


def is_state(path: PathLike) -> bool:
    """Whether there is a file, or a folder x.dcp, to go on from."""
    return is_dcp(path) if names_dcp(path) else is_file(path)


def read_state(path: PathLike) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Read the tensors and the header of a file or a folder."""
    if not names_dcp(path):
        return read_tensors(path)
    folder = DcpFolder(path)
    return load_by_rows(folder), folder.about


def load_state(path: PathLike, state: TrainState, run: Mapping[str, Any]) -> TrainProgress:
    """Put a saved run into `state`; how far it is.

    Raises InputError if the file is no training state, or that of a run with other settings, model,
    objective or data.
    """
    tensors, header = read_state(path)
    if header.get("kind") != "training":
        raise InputError(f"{path}: not a training state")
    check_run(path, header.get("run"), run)
    progress = read_progress(path, header.get("progress"))
    restore(path, state, tensors)
    return progress


def contents(state: TrainState) -> dict[str, Tensor]:
    """All tensors that `restore` needs, by name."""
    tensors = state.tensors()
    tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    for name, parameter in state.parameters().items():
        moments = state.optimizer.state[parameter]
        tensors |= {f"{key}.{name}": moments[key] for key in MOMENTS if key in moments}
        if "step" in moments:
            tensors[f"steps.{name}"] = moments["step"]
    return tensors


def read_moments(path: PathLike, model: nn.Module) -> tuple[str, dict[str, Moment]]:
    """Return the optimiser's class, and the second moments of a model, from its run's state file.

    Raises InputError if the file is no training state, of another model, or of no step yet.
    """
    tensors, header = read_state(path)
    if header.get("kind") != "training":
        raise InputError(f"{path}: not a training state")
    run = header.get("run")
    betas = run.get("betas") if isinstance(run, Mapping) else None
    if not (isinstance(betas, list) and len(betas) == 2 and type(betas[1]) is float):
        raise InputError(f"{path}: does not say with what betas it was trained")
    found = {}
    for name, parameter in model.named_parameters():
        moment, step = (tensors.get(f"{key}.model.{name}") for key in ("exp_avg_sq", "steps"))
        if moment is None or step is None or moment.shape != parameter.shape or step.numel() != 1:
            raise InputError(f"{path}: has no second moment of {name!r}, as the model has it")
        found[name] = moment, betas[1], float(step)
    return "AdamW", found


def check_run(path: PathLike, saved: object, run: Mapping[str, Any]) -> None:
    """Raise InputError unless the run in a file is this one."""
    if not isinstance(saved, Mapping):
        raise InputError(f"{path}: does not say of which run it is")
    for name in sorted(run.keys() | saved.keys()):
        theirs, ours = saved.get(name), run.get(name)
        # 1 and True are equal and no settings of one run.
        if theirs != ours or isinstance(theirs, bool) != isinstance(ours, bool):
            raise InputError(
                f"{path}: belongs to a run with {_differing(name, theirs, ours)}; "
                "remove it or use another state file"
            )


def _differing(name: str, theirs: Any, ours: Any) -> str:
    """Name what differs inside a setting of several parts, and both values."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        keys = sorted(theirs.keys() | ours.keys())
        key = next((key for key in keys if theirs.get(key) != ours.get(key)), None)
        if key is not None:
            return _differing(f"{name}.{key}", theirs.get(key), ours.get(key))
    return f"{name} = {shown(theirs)}, not {shown(ours)}"


def read_progress(path: PathLike, stored: object) -> TrainProgress:
    """Make the progress that a state file holds, which anybody may have written."""
    fields = stored if isinstance(stored, Mapping) else {}
    counts, scores, losses = ("step", "batch"), fields.get("scores"), fields.get("losses")
    sums = fields.get("sums")
    right = (
        fields.keys() == TrainProgress().to_json().keys()
        and all(type(fields[name]) is int and fields[name] >= 0 for name in counts)
        and isinstance(sums, list)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in sums)
        and all(type(total) in (int, float) and type(count) is int for total, count in sums)
        and isinstance(losses, list)
        and all(type(loss) in (int, float) for loss in losses)
        and isinstance(scores, list)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in scores)
        and all(type(epoch) is int and type(score) in (int, float) for epoch, score in scores)
    )
    if not right:
        raise InputError(f"{path}: does not say how far its run is")
    return TrainProgress.from_json(fields)


def restore(path: PathLike, state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    """Put `contents` from a file into `state`; raises InputError if they do not fit."""
    own, parameters = state.tensors(), state.parameters()
    expected = dict(own)
    if any(name.startswith("best.") for name in tensors):
        expected |= {f"best.{name}": tensor for name, tensor in own.items()}
    stepped = [name for name in parameters if f"steps.{name}" in tensors]
    for name in stepped:
        expected[f"steps.{name}"] = torch.zeros(())
        expected |= {f"{key}.{name}": parameters[name] for key in MOMENTS}
    check_stored_tensors(path, tensors, expected)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
            if f"best.{name}" in tensors:
                state.best[name] = tensors[f"best.{name}"].to(tensor.device)
    for name in stepped:
        parameter = parameters[name]
        moments = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in MOMENTS}
        moments["step"] = tensors[f"steps.{name}"].to(parameter.device)
        state.optimizer.state[parameter] = moments
