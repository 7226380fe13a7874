"""Checkpoints written back as their own kind: a copy of the source with other values.

Whatever stands beside the tensors stays as it was, byte for byte: a pickle's program is copied
and never run, so every object of the first member is in the result for the library that knows
it. Only the bytes of storages change, one storage in memory at a time.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor

from fisherkern.adapters.files.checkpoints import Checkpoint, CheckpointFile
from fisherkern.adapters.files.mapped import CHUNK, Region, Slot
from fisherkern.errors import InputError, shown
from fisherkern.files import atomic_path

# What a folder needs beside its weights to be loaded, and what would be wrong of a merge.
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".py")
LEFT_OUT = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")
# torch.save aligns storages so that they can be mapped.
ALIGNMENT = 64


class RowBlocks(Protocol):
    """A mapping of tensors that can be had a block of rows at a time, in order."""

    def blocks(self, name: str) -> Iterable[Tensor]:
        """Yield the tensor's blocks."""
        ...


def write_like(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    source: Checkpoint,
    *,
    replace: bool = False,
    texts: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Write `tensors` as a checkpoint of the kind of `source`.

    A file is a copy of the source's with the tensors' bytes replaced. A folder gets the same
    weight files (shards and their index as they were) and the source's configuration,
    tokenizer and code files. The result is whole or absent.

    Args:
        path: A file, or a folder where the source is a folder; nothing may be there yet.
        tensors: A value for every name of `source`, of its shape and dtype, on any device.
            Fetched one at a time, so a mapping may compute them; one with a method `blocks`
            (`RowBlocks`) gives them a block of rows at a time.
        source: What the result is like; its files are read again.
        replace: Whether a file at `path` is replaced. A folder never is.
        texts: Gives file name -> content of files that a folder gets besides; called when the
            tensors are written.

    Raises:
        InputError: Something is at `path`; a name is missing or unknown; a shape or dtype
            differs; names that share memory have different values; the disk is full.
    """
    target = Path(path)
    if os.path.lexists(target) and not (replace and target.is_file()):
        raise InputError(f"{target}: exists already and is not overwritten")
    # Of sets: to ask a mapping whether it has a name may compute the tensor.
    own, given = set(source), set(tensors)
    missing, unknown = own - given, given - own
    if missing or unknown:
        what, name = ("missing", min(missing)) if missing else ("unknown", min(unknown))
        raise InputError(f"tensor {shown(name)} of {source.path} is {what} in what is written")
    if not source.path.is_dir() and source.index is None:
        with atomic_path(target) as temporary:
            _write_part(temporary, tensors, source.parts[0])
        return
    with new_folder(target) as folder:
        for part in source.parts:
            _write_part(folder / part.path.name, tensors, part)
        for file in companions(source):
            shutil.copyfile(file, folder / file.name)
        for name, text in (texts() if texts else {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def companions(source: Checkpoint) -> Iterator[Path]:
    """Return files that are copied as they are: small ones that loading needs, the index."""
    folder = source.parts[0].path.parent
    for file in sorted(folder.iterdir()):
        wanted = file.suffix in COPIED and file.name not in LEFT_OUT
        if wanted and not file.name.endswith(".index.json") and file.is_file():
            yield file
    if source.index is not None:
        yield source.index


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Make a temporary folder beside `target`, renamed to it when the block succeeds."""
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes it private
        for file in temporary.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        temporary.rename(target)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{target}: could not be written: {reason}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_part(path: Path, tensors: Mapping[str, Tensor], part: CheckpointFile) -> None:
    storages: dict[Region, dict[str, Slot]] = {}
    for name, slot in part.slots.items():
        storages.setdefault(slot.region, {})[name] = slot
    entries = getattr(part.source, "entries", None)
    if entries is not None:
        _write_zip(path, tensors, part, entries, storages)
        return
    file = part.source.file
    with path.open("wb") as stream:
        position = 0
        for region in sorted(storages, key=lambda region: (region.start, region.size)):
            _copy(stream, Region(file, position, region.start - position))
            _write_storage(stream, tensors, region, storages[region])
            position = region.start + region.size
        _copy(stream, Region(file, position, file.size - position))


def _write_zip(
    path: Path,
    tensors: Mapping[str, Tensor],
    part: CheckpointFile,
    entries: Mapping[str, Region],
    storages: Mapping[Region, Mapping[str, Slot]],
) -> None:
    with path.open("wb") as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive:
        for name, region in entries.items():
            info = zipfile.ZipInfo(name)
            # The local header has 30 bytes, the name, the long sizes (20) and the padding (4).
            start = raw.tell() + 30 + len(name.encode()) + 20 + 4
            padding = -start % ALIGNMENT
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with archive.open(info, "w", force_zip64=True) as stream:
                if region in storages:
                    _write_storage(stream, tensors, region, storages[region])
                else:
                    _copy(stream, region)


def _copy(stream: IO[bytes], region: Region) -> None:
    """Copy a part of the source, a piece at a time unless it is compressed."""
    if region.deflated is not None:
        stream.write(region.read())
        return
    for start in range(0, region.size, CHUNK):
        stream.write(region.read(start, min(start + CHUNK, region.size)))


def _write_storage(
    stream: IO[bytes], tensors: Mapping[str, Tensor], region: Region, slots: Mapping[str, Slot]
) -> None:
    """Write a storage that has the new values where its tensors lie."""
    (first, slot), *others = slots.items()
    size = math.prod(slot.shape) * slot.dtype.itemsize
    if slot.contiguous and size == region.size and not others:
        for block in _blocks(tensors, first, slot):
            _write_tensor(stream, block)
        return
    values = {name: _value(tensors, name, slot) for name, slot in slots.items()}
    # What no tensor covers keeps its bytes.
    storage = region.copy()
    for name, slot in slots.items():
        _unexpanded(slot.view(storage)).copy_(_unexpanded(values[name], slot))
    for name, slot in slots.items():
        if not _same_bits(slot.view(storage), values[name]):
            others_named = ", ".join(shown(other) for other in slots if other != name)
            raise InputError(
                f"tensor {shown(name)} shares memory with {others_named or 'itself'} in "
                f"{region.file.path}, and their new values differ"
            )
    _write_tensor(stream, torch.empty(0, dtype=torch.uint8).set_(storage))


def _blocks(tensors: Mapping[str, Tensor], name: str, slot: Slot) -> Iterator[Tensor]:
    """Yield the tensor's blocks where the mapping has them, which fill it; else the tensor."""
    by_rows = getattr(tensors, "blocks", None)
    if by_rows is None or not slot.shape:
        yield _value(tensors, name, slot)
        return
    rows = 0
    for block in by_rows(name):
        rows += len(block)
        yield _checked(block, name, slot, (len(block), *slot.shape[1:]))
    if rows != slot.shape[0]:
        raise InputError(f"tensor {shown(name)} has {rows} rows, and {slot.shape[0]} in the source")


def _value(tensors: Mapping[str, Tensor], name: str, slot: Slot) -> Tensor:
    return _checked(tensors[name].detach(), name, slot, slot.shape)


def _checked(value: Tensor, name: str, slot: Slot, shape: tuple[int, ...]) -> Tensor:
    if value.dtype != slot.dtype or tuple(value.shape) != shape:
        raise InputError(
            f"tensor {shown(name)} is {value.dtype} {tuple(value.shape)}, and {slot.dtype} "
            f"{slot.shape} in {slot.region.file.path}"
        )
    return value.cpu().resolve_conj().resolve_neg()


def _unexpanded(tensor: Tensor, slot: Slot | None = None) -> Tensor:
    """One of the equal rows of every expanded dimension."""
    strides = tensor.stride() if slot is None else slot.stride
    for dim, stride in enumerate(strides):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(_bytes(one), _bytes(other))


def _write_tensor(stream: IO[bytes], tensor: Tensor) -> None:
    content = _bytes(tensor).numpy().data
    for start in range(0, len(content), CHUNK):
        stream.write(content[start : start + CHUNK])
