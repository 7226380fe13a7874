"""Parts of files that are mapped or read when somebody asks for them."""

from __future__ import annotations

import io
import math
import os
import threading
import weakref
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.files import read_into

# A storage of zeros deflates by up to 1032; nothing that was trained comes near 100.
MAX_DEFLATION = 100
# An expanded tensor takes no memory in the file and all of it when somebody computes with it.
MAX_EXPANDED = 1 << 24
CHUNK = 1 << 24


class MappedFile:
    """A file whose bytes are mapped into memory on demand and never written to."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            if not self.path.is_file():  # a pipe would never end
                raise InputError(f"{self.path}: no such file")
            # Kept open: another file under the same name is not what was checked.
            self._stream = self.path.open("rb", buffering=0)
            weakref.finalize(self, self._stream.close)
            self._lock = threading.Lock()
            self.size = os.fstat(self._stream.fileno()).st_size
            self._storage = (
                torch.UntypedStorage.from_file(str(self.path), False, self.size)
                if self.size
                else torch.UntypedStorage(0)
            )
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "the system cannot map it"
            raise InputError(f"{self.path}: could not be read: {reason}") from None

    def opened(self) -> io.RawIOBase:
        """Return a stream of the bytes, for the caller to close."""
        return self.path.open("rb", buffering=0)

    def storage(self, start: int, stop: int) -> torch.UntypedStorage:
        """Return the mapped bytes; writing to them changes memory, never the file."""
        mapped: torch.UntypedStorage = self._storage[start:stop]
        return mapped

    def read(self, start: int, stop: int) -> bytearray:
        """Return a copy of the bytes, read, not mapped: pages of a map count as memory in use."""
        content = bytearray(stop - start)
        self.fill(memoryview(content), start)
        return content

    def fill(self, view: memoryview, start: int) -> None:
        """Read the bytes from `start` on into `view`."""
        with self._lock:
            read_into(self._stream, view, start, self.path)


@dataclass(eq=False)
class Region:
    """`size` bytes of a file from `start` on; `deflated` bytes there where they are compressed.

    Two regions are the same only if they are one object: that is how names share a storage.
    """

    file: MappedFile
    start: int
    size: int
    deflated: int | None = None

    def read(self, start: int = 0, stop: int | None = None) -> bytearray:
        """Return a copy of bytes start..stop."""
        stop = self.size if stop is None else stop
        if self.deflated is None:
            return self.file.read(self.start + start, self.start + stop)
        return self._inflate()[start:stop]

    def storage(self) -> torch.UntypedStorage:
        """Return the bytes, mapped; a copy where they are compressed."""
        if self.deflated is None:
            return self.file.storage(self.start, self.start + self.size)
        return _storage_of(self._inflate())

    def copy(self) -> torch.UntypedStorage:
        """Return the bytes in memory of their own, aligned for every type."""
        return _storage_of(self.read())

    def _inflate(self) -> bytearray:
        assert self.deflated is not None
        inflater, content = zlib.decompressobj(-15), bytearray()
        try:
            for start in range(0, self.deflated, CHUNK):
                stop = min(start + CHUNK, self.deflated)
                packed = self.file.read(self.start + start, self.start + stop)
                content += inflater.decompress(packed, self.size - len(content) + 1)
        except zlib.error:
            content.clear()
        if len(content) != self.size:
            raise InputError(f"{self.file.path}: a compressed part of it is broken")
        return content


def _storage_of(content: bytearray) -> torch.UntypedStorage:
    if not content:
        return torch.UntypedStorage(0)
    return torch.frombuffer(content, dtype=torch.uint8).untyped_storage()


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: in which region, from which element on, with which strides."""

    region: Region
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements from the first to the last, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    @property
    def contiguous(self) -> bool:
        return self.stride == contiguous_stride(self.shape) or math.prod(self.shape) <= 1

    def problem(self) -> str | None:
        """Why this is no tensor of its region, or None."""
        numbers = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or len(self.shape) > 64:
            return "has a strange shape"
        if any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
            return "has a strange shape"
        held = self.region.size // self.dtype.itemsize
        if self.offset + self.extent > held:
            return "reaches beyond its storage"
        if math.prod(self.shape) > max(held, MAX_EXPANDED):
            return "has more entries than its storage, by far"
        return None

    def view(self, storage: torch.UntypedStorage) -> Tensor:
        """Return the tensor in the region's `storage`."""
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)

    def aligned(self) -> bool:
        """Whether the mapped bytes can be used as they lie."""
        return self.region.deflated is None and self.region.start % self.dtype.itemsize == 0

    def load(self) -> Tensor:
        """Return the tensor: mapped where it can be used as it lies, else a copy."""
        if self.aligned():
            return self.view(self.region.storage())
        return self.copy()

    def copy(self) -> Tensor:
        """Return the tensor, read into memory of its own with its strides."""
        size = self.dtype.itemsize
        content = self.region.read(self.offset * size, (self.offset + self.extent) * size)
        return torch.empty(0, dtype=self.dtype).set_(
            _storage_of(content), 0, self.shape, self.stride
        )

    def rows(self, start: int, stop: int) -> Slot:
        """Rows start..stop; the slot itself for a number, which is its only row."""
        if not self.shape:
            return self
        shape = (stop - start, *self.shape[1:])
        return Slot(
            self.region, self.dtype, self.offset + start * self.stride[0], shape, self.stride
        )


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))
