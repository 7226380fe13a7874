"""Folders of `torch.distributed.checkpoint`, read without running their pickles.

A folder's `.metadata` is a pickle that says which boxes of which tensors stand where in its
`.distcp` files; each box there is what `torch.save` writes. Both go through the machine of
`pickles.py`, which calls nothing that a file names: torch's own reader would.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkern.adapters.files.mapped import MappedFile, Slot
from fisherkern.adapters.files.pickles import Global, Pairs, PickleError, Stub, run_program
from fisherkern.adapters.files.torch_files import STORAGE_DTYPES, ZIP_START, read_torch_file
from fisherkern.documents import MAX_SETTINGS, read_json
from fisherkern.errors import InputError, shown
from fisherkern.files import RunningHash, read_into

METADATA = ".metadata"
#: What fisherkern writes beside: the kind and what a model file's header says.
ABOUT = "fisherkern.json"
MAX_METADATA = 1 << 28
_KINDS = "torch.distributed.checkpoint.metadata"
_PLACE = "torch.distributed.checkpoint.filesystem._StorageInfo"
# Boxes of one tensor that are compared with each other, where they are no blocks of rows.
_MOST_BOXES = 1 << 10
# Headers of boxes that are kept.
_KEPT = 1 << 12


class FileWindow(MappedFile):
    """Bytes start … start + size − 1 of a file, as a file of their own; read, never mapped."""

    def __init__(
        self, path: Path, start: int, size: int, hashes: Mapping[Path, RunningHash] | None = None
    ) -> None:
        """`hashes`: of files, which see what is read."""
        self.path, self.size, self._start = path, size, start
        self._hashes = {} if hashes is None else hashes
        try:
            self._stream = path.open("rb", buffering=0)
            weakref.finalize(self, self._stream.close)
            whole = os.fstat(self._stream.fileno()).st_size
        except FileNotFoundError:
            raise InputError(f"{path}: the shard is missing") from None
        except OSError as error:
            raise InputError(f"{path}: could not be read: {error.strerror}") from None
        self._lock = threading.Lock()
        if start + size > whole:
            raise InputError(f"{path}: the shard is cut short: it ends before byte {start + size}")

    def storage(self, start: int, stop: int) -> torch.UntypedStorage:
        """Return a copy of the bytes."""
        content = torch.frombuffer(self.read(start, stop), dtype=torch.uint8)
        return content.untyped_storage()

    def fill(self, view: memoryview, start: int) -> None:
        """Read the bytes from `start` on into `view`."""
        with self._lock:
            read_into(self._stream, view, self._start + start, self.path)
            if (running := self._hashes.get(self.path)) is not None:
                running.saw(view, self._start + start)

    def opened(self) -> io.RawIOBase:
        """Return a stream of the bytes."""
        return _WindowStream(self)


class _WindowStream(io.RawIOBase):
    def __init__(self, window: FileWindow) -> None:
        self._window, self._position = window, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        start = (0, self._position, self._window.size)[whence]
        if start + offset < 0:
            raise OSError("a place before the start")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._window.size - self._position))
        if count:
            self._window.fill(view[:count], self._position)
        self._position += count
        return count


@dataclasses.dataclass(frozen=True)
class TensorBox:
    """A part of a tensor: the box of `sizes` at `offsets`, `length` bytes of a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class BoxedTensor:
    """A tensor by its boxes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[TensorBox, ...]


class DcpFolder(Mapping[str, Tensor]):
    """The tensors of a folder by name; only the rows that are asked for are read.

    Args:
        path: The folder.

    Attributes:
        tensors: How each lies in the files.
        others: Names of what is no tensor, which is not read.
        about: What fisherkern wrote beside, {} in folders of others.
        hashes: Of its files by path, which see what is read of their tensors.

    Raises:
        InputError: It is no such folder, a shard is missing or cut short, or boxes leave gaps.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        value = _metadata(self.path)
        try:
            metadata = _texts(value, f"{_KINDS}.Metadata")
            places = _places(self.path, metadata.get("storage_data"))
            entries = metadata["state_dict_metadata"].texts()
            self.tensors = {
                name: _boxed(
                    self.path, name, _texts(own, f"{_KINDS}.TensorStorageMetadata"), places
                )
                for name, own in entries.items()
                if not (isinstance(own, Stub) and own.is_call_of(f"{_KINDS}.BytesStorageMetadata"))
            }
        except InputError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise InputError(
                f"{self.path / METADATA}: describes no tensors that are known"
            ) from None
        self.others = sorted(set(entries) - set(self.tensors))
        self.about = _about(self.path)
        sizes: dict[Path, int] = {}
        for tensor in self.tensors.values():
            for box in tensor.boxes:
                sizes[box.path] = max(sizes.get(box.path, 0), box.start + box.length)
        for file, size in sizes.items():
            FileWindow(file, 0, size)
        self.hashes: dict[Path, RunningHash] = {}
        self._slot = functools.lru_cache(_KEPT)(functools.partial(_slot_of, self.hashes))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return a copy of rows start..stop; a number is its own only row."""
        tensor = self.tensors[name]
        if not tensor.shape:
            return self._slot(name, tensor.dtype, tensor.boxes[0]).copy()
        if not 0 <= start <= stop <= tensor.shape[0]:
            raise InputError(f"{self.path}: {shown(name)} has no rows {start} to {stop}")
        found = torch.empty(stop - start, *tensor.shape[1:], dtype=tensor.dtype)
        for box in tensor.boxes:
            first, last = box.offsets[0], box.offsets[0] + box.sizes[0]
            low, high = max(start, first), min(stop, last)
            if low >= high or not math.prod(box.sizes):
                continue
            part = self._slot(name, tensor.dtype, box).rows(low - first, high - first).copy()
            place = [slice(o, o + n) for o, n in zip(box.offsets[1:], box.sizes[1:], strict=True)]
            found[(slice(low - start, high - start), *place)] = part
        return found

    def described(self) -> dict[str, Tensor]:
        """Tensors without values, of the shapes and types of these."""
        return {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in self.tensors.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        shape = self.tensors[name].shape
        return self.rows(name, 0, shape[0] if shape else 1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def is_dcp(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder of `torch.distributed.checkpoint`."""
    return (Path(path) / METADATA).is_file()


def _metadata(folder: Path) -> Any:
    """Return the value of the folder's pickle, inert."""
    path = folder / METADATA
    if not is_dcp(folder):
        raise InputError(f"{folder}: no folder of torch.distributed.checkpoint: {METADATA} lacks")
    file = MappedFile(path)
    if file.size > MAX_METADATA:
        raise InputError(f"{path}: has {file.size} bytes, more than {MAX_METADATA}")
    functions = {("torch", "Size"): lambda sizes=(): tuple(sizes)}
    try:
        value, _ = run_program(bytes(file.read(0, file.size)), 0, functions)
    except PickleError as error:
        raise InputError(f"{path}: its pickle {error}") from None
    except IndexError:
        raise InputError(f"{path}: its pickle ends too early") from None
    return value


def _texts(value: Any, kind: str) -> dict[str, Any]:
    """Return the attributes of an object of a class."""
    if not isinstance(value, Stub) or not value.is_call_of(kind):
        raise TypeError(kind)
    if not isinstance(value.state, Pairs):
        raise TypeError(kind)
    return value.state.texts()


# Where a box of a tensor stands: file, first byte, number of bytes.
_Places = dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]]


def _places(folder: Path, given: Any) -> _Places:
    found: _Places = {}
    for index, place in given.pairs:
        own, where = _texts(index, f"{_KINDS}.MetadataIndex"), _texts(place, _PLACE)
        name, offset = where["relative_path"], own.get("offset")
        if type(name) is not str or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise InputError(f"{folder}: a shard is called {shown(name)}, no file beside it")
        if where.get("transform_descriptors"):
            raise InputError(f"{folder / name}: is compressed, and cannot be read by rows")
        numbers = where["offset"], where["length"]
        if any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
            raise TypeError("place")
        if offset is not None:  # of what is no tensor
            found[own["fqn"], _numbers(offset)] = (folder / name, *numbers)
    return found


def _numbers(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or any(type(n) is not int or not 0 <= n < 1 << 62 for n in value):
        raise TypeError("sizes")
    return value


def _boxed(folder: Path, name: str, own: Mapping[str, Any], places: _Places) -> BoxedTensor:
    """Return a tensor whose boxes are all there."""
    dtype = own["properties"].state
    dtype = dtype[0] if type(dtype) is tuple else dtype.texts()["dtype"]
    if not isinstance(dtype, Global) or dtype.module != "torch" or dtype.name not in STORAGE_DTYPES:
        raise TypeError("dtype")
    shape, boxes = _numbers(own["size"]), []
    for chunk in own["chunks"]:
        box = _texts(chunk, f"{_KINDS}.ChunkStorageMetadata")
        offsets, sizes = _numbers(box["offsets"]), _numbers(box["sizes"])
        place = places.get((name, offsets))
        if place is None:
            raise InputError(f"{folder}: of {shown(name)} the part at {list(offsets)} is missing")
        boxes.append(TensorBox(offsets, sizes, *place))
    if (problem := _gap(shape, boxes)) is not None:
        raise InputError(f"{folder}: the parts of {shown(name)} {problem}")
    return BoxedTensor(STORAGE_DTYPES[dtype.name], shape, tuple(boxes))


def _gap(shape: tuple[int, ...], boxes: list[TensorBox]) -> str | None:
    """Why boxes are not a tensor without gaps; None where they are."""
    for box in boxes:
        if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
            return "have other dimensions"
        if any(o + n > m for o, n, m in zip(box.offsets, box.sizes, shape, strict=True)):
            return "reach beyond it"
    if sum(math.prod(box.sizes) for box in boxes) != math.prod(shape):
        return "leave gaps, or overlap"
    full = [box for box in boxes if math.prod(box.sizes)]
    if all(box.sizes[1:] == shape[1:] for box in full):
        full.sort(key=lambda box: box.offsets)
        ends = [0, *(box.offsets[0] + box.sizes[0] for box in full if shape)]
        starts = [box.offsets[0] for box in full if shape]
        return "overlap" if ends[: len(starts)] != starts else None
    if len(full) > _MOST_BOXES:
        return f"are more than {_MOST_BOXES} that are no blocks of rows"
    apart = all(_apart(one, other) for one, other in itertools.combinations(full, 2))
    return None if apart else "overlap"


def _apart(one: TensorBox, other: TensorBox) -> bool:
    both = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return any(a + n <= b or b + m <= a for a, n, b, m in both)


def _slot_of(
    hashes: Mapping[Path, RunningHash], name: str, dtype: torch.dtype, box: TensorBox
) -> Slot:
    """Where a box's values lie, of what `torch.save` wrote there."""
    window = FileWindow(box.path, box.start, box.length, hashes)
    # What torch.save wrote before 1.6 is read from the start of a file alone.
    zipped = bytes(window.read(0, min(4, window.size))) == ZIP_START
    found = read_torch_file(window) if zipped else None
    value = None if found is None else found.value
    if not isinstance(value, Slot) or value.dtype != dtype or value.shape != box.sizes:
        raise InputError(f"{box.path}: what stands at byte {box.start} is no part of {shown(name)}")
    return value


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    if not path.is_file():
        return {}
    value = read_json(path, MAX_SETTINGS)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object")
    return value
