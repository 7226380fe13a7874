"""One run of a command: its arguments, the data and models they name, and what it writes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisherkern.data import SequenceDataset, load
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError, shown
from fisherkern.evaluation import Report, evaluate
from fisherkern.files import write_json
from fisherkern.training import load_model

# Where work goes by default for commands that mostly run a model.
BEST_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Run:
    """What a command was given.

    Args:
        command: its name.
        values: all its arguments by name.
        data_arguments: the names of those that say how data is read.
        given: the names of those that flags or the --config file gave.
    """

    command: str
    values: Mapping[str, Any]
    data_arguments: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Refuse what every command would refuse, before any work."""
        threads, out = self.values["threads"], self.values["out"]
        if threads is not None and threads < 1:
            raise InputError(f"--threads: must be at least 1, got {threads}")
        if out is not None:
            there = next(path for path in (out, *out.parents) if path.exists())
            if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
                raise InputError(f"{out}: no folder can be written there")

    def of(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The arguments of a public function that this run has."""
        values = {**self.values, "progress": self.progress}
        names = inspect.signature(function).parameters
        return {name: values[name] for name in names if name in values}

    @property
    def seed(self) -> int:
        return self.values["seed"]

    @property
    def progress(self) -> bool:
        return not self.values["quiet"]

    @property
    def device(self) -> torch.device:
        """The device of --device, which must be there."""
        name = self.values["device"]
        try:
            device = torch.device(name)
        except RuntimeError:
            raise InputError(f"--device: {shown(name)} is not like cpu, cuda or cuda:1") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError("--device: there is no CUDA device here")
        return device

    def data(self, name: str | None = None) -> SequenceDataset:
        """The data set of --data, or of the name that a recipe gives."""
        name = self.values["data"] if name is None else name
        if name is None:
            raise InputError("--data: name a data set (ml-1m, beauty, synthetic) or a file")
        return load(name, **{key: self.values[key] for key in self.data_arguments})

    def model(self, path: Path) -> SequenceEncoder:
        """The model of a checkpoint, on the run's device."""
        device = self.device
        return load_model(path).to(device)

    def batches(self, model: SequenceEncoder, data: SequenceDataset, **how: Any) -> Iterable[Any]:
        """`data.loader` for a model, its batches on the run's device."""
        loader = data.loader(max_len=model.max_len, **how)
        return loader if self.device.type == "cpu" else _OnDevice(loader, self.device)

    def out(self, default: str) -> Path:
        """The folder of --out, or one of runs/."""
        return self.values["out"] or Path("runs") / default

    def finish(self, out: Path, result: Mapping[str, Any]) -> None:
        """Write result.json: the command's arguments and what it found."""
        arguments = {name: _plain(value) for name, value in self.values.items()}
        content = {"arguments": {"command": self.command, **arguments}, **result}
        write_json(out / "result.json", content)


@dataclass(frozen=True)
class _OnDevice:
    """Batches moved to a device as they come."""

    loader: Iterable[Mapping[str, torch.Tensor]]
    device: torch.device

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.loader:
            yield {name: tensor.to(self.device) for name, tensor in batch.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, int | float | str | None) else str(value)


def over_catalogue_of(model: SequenceEncoder, data: SequenceDataset, path: Path) -> SequenceDataset:
    """The data over the model's catalogue, which may hold more items: a merge's union."""
    if model.item_ids is not None and list(model.item_ids) != list(data.item_ids):
        return data.with_items(model.item_ids)
    if model.num_items != data.num_items:
        raise InputError(f"{path}: its catalogue is not that of {data.name}")
    return data


def on_validation(model: SequenceEncoder, data: SequenceDataset, batch_size: int) -> Report:
    """The metrics at 10 of the validation items, by which members and merges are chosen."""
    own = over_catalogue_of(model, data, Path("the model"))
    return evaluate(model, own, split="validation", k=10, batch_size=batch_size)
