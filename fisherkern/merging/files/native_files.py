"""Native checkpoints of other libraries, read a block of rows at a time."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fisherkern.adapters import Checkpoint, load_tensors
from fisherkern.adapters.files.mapped import MappedFile, Slot
from fisherkern.errors import InputError
from fisherkern.files import RunningHash
from fisherkern.merging.files.tensor_files import PASSED, TYPES, TensorFile, raw

KINDS = {dtype: kind for kind, dtype in TYPES.items()}
# Running statistics of batch normalisation, which no gradient moves.
_RUNNING = ("running_mean", "running_var")


class NativeFile(TensorFile):
    """A native checkpoint of any kind that `load_tensors` reads.

    Names of one and the same memory are one tensor, under the first of them.
    """

    checkpoint: Checkpoint

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoint = load_tensors(path)
        self.about, self.metadata = {}, {}
        self.layout = {}
        aliases: dict[str, str] = {}
        first: dict[Slot, str] = {}
        for name in self.checkpoint.names():
            slot = self.checkpoint.slot(name)
            if slot.dtype not in KINDS:
                kind = str(slot.dtype).removeprefix("torch.")
                raise InputError(f"{path}: tensor {name!r} is {kind}, which cannot be merged")
            main = first.setdefault(slot, name) if slot.extent else name
            if main == name:
                self.layout[name] = KINDS[slot.dtype], tuple(slot.shape)
            else:
                aliases[name] = main
        self.aliases = aliases
        self._hashes: dict[MappedFile, RunningHash] = {}

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor is known to be no parameter."""
        return name in self.checkpoint.buffers or name.endswith(_RUNNING)

    def close(self) -> None:
        """Nothing is held open but by the checkpoint."""

    def _fill(self, name: str, offset: int, view: memoryview) -> None:
        slot = self.checkpoint.slot(name)
        if slot.contiguous and slot.region.deflated is None:
            start = slot.region.start + slot.offset * slot.dtype.itemsize + offset
            slot.region.file.fill(view, start)
            if (running := self._hashes.get(slot.region.file)) is not None:
                running.saw(view, start)
            return
        row = raw_size(self, name)
        rows = self.checkpoint.rows(name, offset // row, (offset + len(view)) // row)
        view[:] = raw(rows)

    def start_hash(self) -> None:
        """Hash from now on what is read."""
        for file in (part.source.file for part in self.checkpoint.parts):
            self._hashes[file] = RunningHash(file.fill, file.size, PASSED)

    def sha256(self) -> str:
        """Of its file; of several, of their names and hashes."""
        if not self._hashes:
            self.start_hash()
        found = {
            part.path.name: self._hashes[part.source.file].hexdigest()
            for part in self.checkpoint.parts
        }
        if len(found) == 1:
            return next(iter(found.values()))
        lines = "".join(f"{digest}  {name}\n" for name, digest in found.items())
        return hashlib.sha256(lines.encode()).hexdigest()


def raw_size(file: TensorFile, name: str) -> int:
    """Bytes of one row of a tensor."""
    kind, shape = file.layout[name]
    size = TYPES[kind].itemsize
    for length in shape[1:]:
        size *= length
    return size


def open_member(path: str | os.PathLike[str]) -> TensorFile:
    """Open a model file of ours, or a native checkpoint."""
    return NativeFile(path) if is_native(path) else TensorFile(path)


def is_native(path: str | os.PathLike[str]) -> bool:
    """Whether this is another library's checkpoint, rather than a model file of ours."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return Path(path).suffix != ".safetensors"
    file = TensorFile(path)
    file.close()
    return "kind" not in file.about
