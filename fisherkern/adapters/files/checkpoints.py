"""Native checkpoints of other libraries, read without running anything of theirs.

`load_tensors` reads what `torch.save` wrote (.pth, .pt, .bin, .ckpt; state dicts, trainers'
dictionaries around them, whole modules), safetensors files, Hugging Face folders with one file
or shards, and PEFT folders. `write_like` writes the same kind with other values.

**The guarantee.** No class, constructor or function that a file names is imported or called.
Pickles go through a machine of our own (`fisherkern.adapters.files.pickles`) that knows how torch
describes tensors and keeps everything else as inert stubs. Sizes in a file are held to the
file's own size before anything is allocated; a broken or hostile file is an `InputError`.

**Its limits.** Values are not verified: the checksums of a zip archive would cost a pass over
the whole file, so a flipped bit inside a tensor is a flipped bit in the result. Tensors are
mapped: a file that is cut short by somebody else while its tensors are in use ends the
process, as with every mapped file (`rows` reads and refuses instead). A program of more than
4 million opcodes is refused. A library that loads what was written may run what stood in the
first member's pickle, exactly as it would have run it in that member.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkern.adapters.files.item_ids import Ids, ids_of
from fisherkern.adapters.files.mapped import MappedFile, Region, Slot
from fisherkern.adapters.files.pickles import Pairs
from fisherkern.adapters.files.safetensors_files import SafetensorsFile, read_safetensors
from fisherkern.adapters.files.states import SavedState, find_state
from fisherkern.adapters.files.torch_files import TorchFile, read_torch_file
from fisherkern.documents import MAX_SETTINGS, read_json
from fisherkern.errors import InputError, shown

# As transformers looks for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass
class CheckpointFile:
    """One file of a checkpoint and the tensors that it holds."""

    source: TorchFile | SafetensorsFile
    slots: dict[str, Slot]

    @property
    def path(self) -> Path:
        return self.source.file.path


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, mapped from its files when they are asked for.

    A tensor is a view of mapped memory: reading it reads its pages, and changing it never
    changes the file. Names that shared a storage when they were saved share it again.

    Attributes:
        path: The file or folder.
        kind: "state dict", "nested state dict", "module", "lightning", "recbole",
            "safetensors", "huggingface" or "peft".
        item_ids: External ids in the order of the library's item numbers, where the
            checkpoint carries them (RecTools); else None.
        config: The folder's config.json or adapter_config.json; else None.
        extras: What stood beside the tensors, inert.
        parts: Its files.
        buffers: Names of tensors that are no parameters, where the file says so (whole modules).
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        parts: list[CheckpointFile],
        *,
        config: dict[str, Any] | None = None,
        extras: dict[str, Any] | None = None,
        index: Path | None = None,
        buffers: frozenset[str] = frozenset(),
    ) -> None:
        self.path, self.kind, self.parts = path, kind, parts
        self.config, self.extras, self.index = config, extras or {}, index
        self.buffers = buffers
        self.item_ids = _item_ids(self.extras)
        self._slots = {name: slot for part in parts for name, slot in part.slots.items()}
        uses = Counter(slot.region for slot in self._slots.values())
        self._shared: dict[Region, torch.UntypedStorage | None] = {
            region: None for region, count in uses.items() if count > 1
        }

    def names(self) -> list[str]:
        """All names, in the order of the files."""
        return list(self._slots)

    def slot(self, name: str) -> Slot:
        """Where a tensor lies."""
        if name not in self._slots:
            raise KeyError(name)
        return self._slots[name]

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self.slot(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.slot(name).dtype

    def tensor(self, name: str) -> Tensor:
        """Return the tensor, of the shape, strides, dtype and bits that were saved."""
        slot = self.slot(name)
        if slot.region not in self._shared:
            return slot.load()
        storage = self._shared[slot.region]
        if storage is None:
            storage = slot.region.storage() if slot.aligned() else slot.region.copy()
            self._shared[slot.region] = storage
        return slot.view(storage)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return a copy of rows start..stop, which alone are read; a number is its own only row."""
        slot = self.slot(name)
        length = slot.shape[0] if slot.shape else 1
        if not 0 <= start <= stop <= length:
            raise InputError(f"{self.path}: {shown(name)} has no rows {start} to {stop}")
        return slot.rows(start, stop).copy()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, kind={self.kind!r}, {len(self)} tensors)"


def load_tensors(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a native checkpoint of any library; nothing in the file is ever run.

    Args:
        path: A .pth, .pt, .bin, .ckpt or .safetensors file, told apart by content; a folder of
            Hugging Face or PEFT; or the index.json of a folder's shards.

    Returns:
        A mapping from names to tensors on the CPU that are mapped when asked for.

    Raises:
        InputError: The file is missing, cut short, of an unknown kind, or holds no tensors or
            tensors that cannot be merged (quantised, sparse, nested).
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.name.endswith(".index.json") and path.is_file():
            return _read_folder(path.parent, path.name)
        part, state = _read_file(path)
    except OSError as error:
        raise InputError(f"{path}: could not be read: {error.strerror}") from None
    return Checkpoint(path, state.kind, [part], extras=state.extras, buffers=state.buffers)


def _read_file(path: Path) -> tuple[CheckpointFile, SavedState]:
    """One file, and what was found in it."""
    file = MappedFile(path)
    source = None if path.suffix == ".safetensors" else read_torch_file(file)
    if source is not None:
        state = find_state(path, source.value)
        return CheckpointFile(source, state.slots), state
    start = bytes(file.read(0, min(file.size, 64)))
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a pointer of Git LFS in place of the file (git lfs pull)")
    if path.suffix != ".safetensors" and start[8:9] != b"{":
        raise InputError(f"{path}: neither written by torch.save nor a safetensors file")
    tensors = read_safetensors(file)
    if not tensors.slots:
        raise InputError(f"{path}: holds no tensors")
    return CheckpointFile(tensors, tensors.slots), SavedState("safetensors", tensors.slots, {})


def read_json_object(path: Path) -> dict[str, Any]:
    """Return a JSON object of a file that somebody sent."""
    value = read_json(path, MAX_SETTINGS)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object")
    return value


def _read_folder(folder: Path, weights: str | None = None) -> Checkpoint:
    peft = weights is None and (folder / "adapter_config.json").is_file()
    candidates = ADAPTER_WEIGHTS if peft else WEIGHTS
    weights = weights or next((n for n in candidates if (folder / n).is_file()), None)
    if weights is None:
        raise InputError(f"{folder}: a folder without {' or '.join(candidates)}")
    settings = folder / ("adapter_config.json" if peft else "config.json")
    config = read_json_object(settings) if settings.is_file() else None
    kind = "peft" if peft else "huggingface"
    if weights.endswith(".index.json"):
        return Checkpoint(
            folder, kind, _shards(folder, folder / weights), config=config, index=folder / weights
        )
    part, state = _read_file(folder / weights)
    return Checkpoint(folder, kind, [part], config=config, extras=state.extras)


def _shards(folder: Path, index: Path) -> list[CheckpointFile]:
    """Return the files that an index names, each with the tensors that the index says."""
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index}: has no weight_map")
    expected: dict[str, set[str]] = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise InputError(f"{index}: {shown(name)} is in {shown(shard)}, not a file beside it")
        expected.setdefault(shard, set()).add(name)
    parts = []
    for shard in sorted(expected):
        if not (folder / shard).is_file():
            raise InputError(f"{index}: the shard {shown(shard)} is missing")
        part, _ = _read_file(folder / shard)
        for name in sorted(expected[shard] ^ part.slots.keys()):
            has, lacks = (index, shard) if name in expected[shard] else (shard, index)
            raise InputError(
                f"{index}: {shown(name)} stands in {Path(has).name} and not in {Path(lacks).name}"
            )
        parts.append(part)
    return parts


def _item_ids(extras: dict[str, Any]) -> Ids | None:
    """RecTools' `item_external_ids`, among the hyper-parameters that Lightning saves."""
    parameters = extras.get("hyper_parameters")
    known = parameters.texts() if isinstance(parameters, Pairs) else {}
    return ids_of(known.get("item_external_ids"))
