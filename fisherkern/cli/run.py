"""One run of a command: its arguments, the data and models they name, and what it writes."""

from __future__ import annotations

import contextlib
import errno
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from fisherkern import processes
from fisherkern.checks import device_named
from fisherkern.cli.claims import FolderClaim, result_path
from fisherkern.data import SequenceDataset, load
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError, shown
from fisherkern.evaluation import Report, evaluate
from fisherkern.files import write_json
from fisherkern.training import load_model

Made = TypeVar("Made")

MOST_BYTES = 255  # of a name in a file system
MOST_THREADS = max(64, os.cpu_count() or 1)  # of many more the system runs out
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
        claims: on the folders that are written to, given up at the end.
    """

    command: str
    values: Mapping[str, Any]
    data_arguments: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()
    claims: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, compare=False)

    def __post_init__(self) -> None:
        """Refuse what every command would refuse, before any work."""
        for name, value in self.values.items():
            for entry in value if isinstance(value, list | tuple) else [value]:
                _check_value(_flag(name), entry)
        threads = self.values["threads"]
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise InputError(f"--threads: must be from 1 to {MOST_THREADS}, got {threads}")
        if self.seed < 0:
            raise InputError(f"--seed: must not be negative, got {self.seed}")
        for name in ("out", "log_dir"):
            if self.values.get(name) is not None:
                folder = Path(self.values[name])  # or a page, as `fisherkern report` writes
                _check_folder(folder.parent if folder.suffix == ".html" else folder)

    def of(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Return the arguments of a public function that this run has."""
        values = {**self.values, "progress": self.progress}
        names = inspect.signature(function).parameters
        return {name: values[name] for name in names if name in values}

    @property
    def seed(self) -> int:
        """The seed of every draw."""
        return int(self.values["seed"])

    @property
    def progress(self) -> bool:
        """Whether this process shows bars."""
        return not self.values["quiet"] and processes.rank() == 0

    @property
    def device(self) -> torch.device:
        """The device of --device, which must be there; one for each process of torchrun's."""
        device = device_named(self.values["device"])
        if device.type == "cuda" and processes.started_by_torchrun() > 1:
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def data(self, name: str | None = None) -> SequenceDataset:
        """Return the data set of --data, or of the name that a recipe gives."""
        name = self.values["data"] if name is None else name
        if name is None:
            raise InputError("--data: name a data set (ml-1m, beauty, synthetic) or a file")
        with processes.together():
            return load(name, **{key: self.values[key] for key in self.data_arguments})

    def model(self, path: Path, *, shard: bool = False) -> SequenceEncoder:
        """Return the model of a checkpoint, on the run's device; its tables by rows if `shard`."""
        with processes.together():
            device, world = self.device, processes.world()
            if shard and world == 1:
                raise InputError("--shard: shares rows among processes, which torchrun starts")
            if not shard:
                return load_model(path).to(device)
            from torch.distributed.device_mesh import init_device_mesh

            return load_model(path, init_device_mesh(device.type, (world,))).to(device)

    def batches(self, model: SequenceEncoder, data: SequenceDataset, **how: Any) -> Iterable[Any]:
        """`data.loader` for a model, its batches on the run's device."""
        loader = data.loader(max_len=model.max_len, **how)
        return loader if self.device.type == "cpu" else _OnDevice(loader, self.device)

    def out(
        self,
        default: str,
        *names: str,
        folder: Path | None = None,
        inputs: Iterable[Path] = (),
        same_arguments: bool = False,
    ) -> Path:
        """Claim the folder of --out, or one of runs/, until the end of the run.

        Args:
            default: name in runs/.
            names: of the files that the command will write there.
            folder: in place of --out.
            inputs: files that are read beside those of the arguments.
            same_arguments: see `FolderClaim`.
        """
        out: Path = folder or self.values["out"] or Path("runs") / default
        read = [*self._files(), *inputs]
        claim = FolderClaim(
            out, self.command, self.arguments, names, read, same_arguments=same_arguments
        )
        self.write(self._claim, claim)
        return out

    def _claim(self, claim: FolderClaim) -> None:
        _check_folder(claim.out)
        self.claims.enter_context(claim)

    def write(self, function: Callable[..., Made], *given: Any, **named: Any) -> Made:
        """Call a function that writes files; gives its result.

        Of several processes the first alone calls it. All get the result, and end where it fails.
        """
        made: list[Made] = []
        with processes.together():
            if processes.rank() == 0:
                made.append(function(*given, **named))
        first: list[Made] = processes.gathered(made)[0]
        return first[0]

    def _files(self) -> list[Path]:
        """Return the files that the arguments name."""
        given = [v for name, v in self.values.items() if name not in ("out", "log_dir")]
        entries = [entry for v in given for entry in (v if isinstance(v, list | tuple) else [v])]
        return [entry for entry in entries if isinstance(entry, Path)]

    @property
    def arguments(self) -> dict[str, Any]:
        """What result.json says of the arguments; beside a recipe, those that were given."""
        told = self.given if self.values.get("recipe") else self.values
        return {name: _plain(v) for name, v in self.values.items() if name in told}

    def finish(self, out: Path, result: Mapping[str, Any]) -> None:
        """Write result.json, see `result_path`: the command's arguments and what it found."""
        content = {"arguments": {"command": self.command, **self.arguments}, **result}
        self.write(lambda: write_json(result_path(out, self.command), content))


def check_most(name: str, value: int | None, most: int = 1 << 16) -> None:
    """Refuse a size that no network has, before anything is built of it."""
    if value is not None and value > most:
        raise InputError(
            f"--{name.replace('_', '-')}: must be at most {most:,}, got {shown(value)}"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_value(flag: str, value: Any) -> None:
    """Refuse what no argument may be: a number that nothing can count to, a path of no system."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{flag}: must be finite, got {value}")
    most = 63 if flag == "--seed" else 31  # bits: no other number is near
    if isinstance(value, int) and not abs(value) < 1 << most:
        raise InputError(f"{flag}: must be below 2^{most}, got {shown(value)}")
    if isinstance(value, Path):
        try:
            value.exists()
            if max(map(len, map(os.fsencode, value.parts)), default=0) > MOST_BYTES:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{flag}: {shown(value)}: {reason}") from None


def _check_folder(path: Path) -> None:
    """Refuse a folder that cannot be written to or made."""
    try:
        there = next(own for own in (path, *path.parents) if own.exists() or own.is_symlink())
    except OSError as error:
        reason = error.strerror
        raise InputError(f"{shown(path)}: no folder can be written there: {reason}") from None
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(f"{path}: no folder can be written there")


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
    """Return the data over the model's catalogue, which may hold more items: a merge's union."""
    if model.item_ids is not None and list(model.item_ids) != list(data.item_ids):
        return data.with_items(model.item_ids)
    if model.num_items != data.num_items:
        raise InputError(f"{path}: its catalogue is not that of {data.name}")
    return data


def on_validation(
    model: SequenceEncoder, data: SequenceDataset, batch_size: int, **which: Any
) -> Report:
    """Return the metrics at 10 of the validation items, by which members and merges are chosen."""
    own = over_catalogue_of(model, data, Path("the model"))
    return evaluate(model, own, split="validation", k=10, batch_size=batch_size, **which)
