"""Files that are whole or absent: atomic writes, checked safetensors, JSON."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

from fisherkern.documents import TensorHeader, header_length, parse_header
from fisherkern.documents import read_json as read_json  # beside write_json
from fisherkern.errors import InputError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside `path`, renamed to `path` when the block succeeds.

    The temporary file is removed when it does not, so a reader sees the old file
    or the new one and never a part; what a killed process left is removed by the next
    write to the same name. Raises InputError when the system refuses (disk full, no
    permission).
    """
    target = Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        prefix = f".{target.name}.{_machine()}.{os.getpid()}."
        handle, name = tempfile.mkstemp(prefix=prefix, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes the file private; give it the mode a plain open() would.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(target)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target}: could not be written: {reason}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@functools.cache
def _machine() -> str:
    """Return what process ids are counted by: hosts and containers may share a folder."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _remove_stale(target: Path) -> None:
    """Remove the temporary files of `target` whose process is gone, where that is allowed."""
    if os.name != "posix":  # elsewhere signal 0 is no question
        return
    prefix = f".{target.name}.{_machine()}."
    with contextlib.suppress(OSError):
        for path in target.parent.iterdir():
            process, dot, _ = path.name.removeprefix(prefix).partition(".")
            if path.name.startswith(prefix) and dot and process.isdecimal() and _gone(int(process)):
                path.unlink(missing_ok=True)


def _gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        return False
    return False


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=1, allow_nan=False, default=_number)
        temporary.write_text(text + "\n", encoding="utf-8")


def _number(value: Any) -> Any:
    """Python's number for one of NumPy's, which sizes, seeds and metrics may be."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON value")


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is such a file; InputError for what is there and no regular file."""
    try:
        kind = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # a name of 300 characters, or with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: could not be read: {reason}") from None
    if not stat.S_ISREG(kind.st_mode):
        raise InputError(f"{path}: not a regular file")
    return True


def read_into(stream: io.FileIO, view: memoryview, start: int, path: Path) -> None:
    """Fill `view` with the file's bytes from `start` on.

    Raises:
        InputError: The file of that path cannot be read, or ends before.
    """
    done = 0
    try:
        stream.seek(start)
        while done < len(view):  # one call reads at most 2 GB
            count = stream.readinto(view[done:])
            if not count:
                raise InputError(f"{path}: became shorter while it was read")
            done += count
    except OSError as error:
        raise InputError(f"{path}: could not be read: {error.strerror}") from None


class RunningHash:
    """The SHA-256 of a file, of bytes that are read for other ends as long as they come in order.

    Bytes that were passed over are read when they are few, or at the end.
    """

    def __init__(self, fill: Callable[[memoryview, int], None], size: int, most: int) -> None:
        """`fill` reads into a view from a place on; gaps of `most` bytes are read at once."""
        self._fill, self._size, self._most = fill, size, most
        self._digest, self._done = hashlib.sha256(), 0

    def saw(self, view: memoryview, start: int) -> None:
        """Go on with bytes that were read from `start` on."""
        if self._done < start <= self._done + self._most:
            self._read(start)
        if start <= self._done < start + len(view):
            self._digest.update(view[self._done - start :])
            self._done = start + len(view)

    def hexdigest(self) -> str:
        """Return the hash of the whole file, whose rest is read."""
        self._read(self._size)
        return self._digest.hexdigest()

    def _read(self, stop: int) -> None:
        piece = memoryview(bytearray(min(1 << 20, max(0, stop - self._done))))
        while self._done < stop:
            own = piece[: stop - self._done]
            self._fill(own, self._done)
            self._digest.update(own)
            self._done += len(own)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata (any JSON values) as safetensors; for inside `atomic_path`."""
    plain: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if place in memory else own  # a file has no shared memory
        memory.add(place)
    # Sorted and compact, so that the same content is the same bytes.
    header = {"fisherkern": json.dumps(metadata, sort_keys=True, allow_nan=False, default=_number)}
    safetensors.torch.save_file(plain, path, metadata=header)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """`write_tensors`, whole or not at all."""
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, metadata)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: (tensors on CPU, metadata).

    The metadata is {} for a safetensors file of someone else's. Raises InputError
    for a missing, truncated or malformed file.
    """
    if not is_file(path):
        raise InputError(f"{path}: no such file")
    try:
        with Path(path).open("rb", buffering=0) as stream:
            about = read_header(stream, path).about(path)
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, AttributeError, RuntimeError) as error:
        # Of a type that PyTorch, or this version of it, does not have.
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: not a whole safetensors file: {reason}") from error


def read_header(stream: io.FileIO, path: str | os.PathLike[str]) -> TensorHeader:
    """Read the header of an open safetensors file and hold it to the file's size."""
    size = os.fstat(stream.fileno()).st_size
    content = bytearray(header_length(path, size, stream.read(8) or b""))
    read_into(stream, memoryview(content), 8, Path(path))
    return parse_header(path, size, content)
