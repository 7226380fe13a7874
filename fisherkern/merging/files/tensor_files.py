"""Safetensors files read and written a block of rows at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fisherkern.adapters import Checkpoint
from fisherkern.documents import TensorHeader
from fisherkern.errors import InputError, shown
from fisherkern.files import RunningHash, is_file, read_header, read_into
from fisherkern.processes import gathered, rank, together, world

# Safetensors' names of the types that PyTorch computes with, and the types.
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# What `take` reads along rather than skips, what it reads at once, and what a running hash reads
# along, in bytes.
PAGE, SPAN, PASSED = 1 << 12, 1 << 24, 1 << 20
# What hashing a member, and reading it for that, takes of a processor beside merging it.
HASHING = 0.5


class TensorFile:
    """A safetensors file whose header has been checked; only blocks asked for are read.

    layout: name -> (type as safetensors calls it, shape). metadata: the header's strings.
    about: what fisherkern wrote there, {} in files of others. aliases: other names of the same
    memory -> the name in `layout`. checkpoint: the native checkpoint that is read, None for a
    file of ours.
    """

    aliases: Mapping[str, str] = MappingProxyType({})
    checkpoint: Checkpoint | None = None
    _running: RunningHash | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not is_file(self.path):
            raise InputError(f"{self.path}: no such file")
        try:
            # Read rather than mapped, as pages of a mapped file count as memory in use.
            self._stream = self.path.open("rb", buffering=0)
        except OSError as error:
            raise InputError(f"{self.path}: could not be read: {error.strerror}") from None
        try:
            self._read(read_header(self._stream, self.path))
        except InputError:
            self._stream.close()
            raise

    def _read(self, header: TensorHeader) -> None:
        self.metadata: dict[str, str] = header.metadata
        self.about = header.about(self.path)
        self._places: dict[str, int] = {}
        self.layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, own in sorted(header.tensors.items()):
            if own.dtype not in TYPES:
                raise InputError(
                    f"{self.path}: tensor {shown(name)} is {own.dtype}, which cannot be merged"
                )
            self.layout[name] = (own.dtype, own.shape)
            self._places[name] = own.start

    @property
    def beside(self) -> Path:
        """The JSON file that has the item ids of a model."""
        return self.path.with_suffix(".json")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def is_buffer(self, name: str) -> bool:
        """Whether a native checkpoint's tensor is known to be no parameter."""
        return False

    def floating(self, name: str) -> bool:
        """Whether the tensor holds floating-point numbers."""
        return TYPES[self.layout[name][0]].is_floating_point

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start..stop of a tensor; a number is one row of shape ()."""
        kind, shape = self.layout[name]
        shape = (stop - start, *shape[1:]) if shape else ()
        row = math.prod(shape[1:]) * TYPES[kind].itemsize
        content = bytearray((stop - start) * row)
        if not content:
            return torch.empty(shape, dtype=TYPES[kind])
        self._fill(name, start * row, memoryview(content))
        return torch.frombuffer(content, dtype=TYPES[kind]).reshape(shape)

    def _fill(self, name: str, offset: int, view: memoryview) -> None:
        """Read a tensor's bytes from `offset` on, a whole number of rows."""
        start = self._places[name] + offset
        self._read_at(view, start)
        if self._running is not None:
            self._running.saw(view, start)

    def _read_at(self, view: memoryview, start: int) -> None:
        read_into(self._stream, view, start, self.path)

    def take(self, name: str, index: Tensor) -> Tensor:
        """Return the rows `index` (n,) int64 of a tensor, zeros where it is -1.

        Read in the order of the file: rows that follow one another in one piece, with those
        between that are fewer than a page. Holds `SPAN` bytes beside the result.
        """
        kind, shape = self.layout[name]
        result = torch.zeros(len(index), *shape[1:], dtype=TYPES[kind])
        row = math.prod(shape[1:]) * result.element_size()
        have = (index >= 0).nonzero()[:, 0]
        if not row or not len(have):
            return result
        rows, order = index[have].sort()
        start, stop = int(rows[0]), int(rows[-1]) + 1
        if stop - start == len(rows) == len(index) and torch.equal(rows, index):
            return self.rows(name, start, stop)
        table = result.view(len(index), -1).view(torch.uint8)
        have = have[order]
        # A piece lies in one window of the file, so that no piece is longer than that.
        window = max(1, SPAN // row)
        new = (rows.diff() > max(1, PAGE // row)) | (rows // window).diff().bool()
        cuts = [0, *(new.nonzero()[:, 0] + 1).tolist(), len(rows)]
        for batch in self._batches(rows, cuts, window):
            first, last = cuts[batch[0]], cuts[batch[-1] + 1]
            starts = rows[[cuts[i] for i in batch]]
            lengths = rows[[cuts[i + 1] - 1 for i in batch]] + 1 - starts
            offsets = lengths.cumsum(0) - lengths
            content = bytearray(int(lengths.sum()) * row)
            view = memoryview(content)
            for begin, length, offset in zip(
                starts.tolist(), lengths.tolist(), offsets.tolist(), strict=True
            ):
                self._fill(name, begin * row, view[offset * row : (offset + length) * row])
            counts = torch.tensor([cuts[i + 1] - cuts[i] for i in batch])
            shift = (offsets - starts).repeat_interleave(counts)
            found = torch.frombuffer(content, dtype=torch.uint8).view(-1, row)
            table[have[first:last]] = found[rows[first:last] + shift]
        return result

    @staticmethod
    def _batches(rows: Tensor, cuts: Sequence[int], window: int) -> Iterator[range]:
        """Numbers of the pieces that are read together: of at most two windows' rows."""
        ends = torch.tensor(cuts[1:]) - 1
        lengths = (rows[ends] + 1 - rows[torch.tensor(cuts[:-1])]).tolist()
        start, total = 0, 0
        for number, length in enumerate(lengths):
            if total and total + length > window:
                yield range(start, number)
                start, total = number, 0
            total += length
        yield range(start, len(lengths))

    def blocks(self, name: str, step: int) -> Iterator[Tensor]:
        """Yield the tensor, `step` rows at a time."""
        for start, stop in spans(self.layout[name][1], step):
            yield self.rows(name, start, stop)

    def start_hash(self) -> None:
        """Hash from now on what is read, so that `sha256` has less to read."""
        size = os.fstat(self._stream.fileno()).st_size
        self._running = RunningHash(self._read_at, size, most_between())

    def sha256(self) -> str:
        """Of the whole file."""
        if self._running is None:
            self.start_hash()
        assert self._running is not None
        return self._running.hexdigest()

    def fingerprint(self, names: Mapping[str, str], entries: int) -> str:
        """`fisherkern.fingerprint.fingerprint` of a model whose parameters have these names.

        `names`: a parameter's name in the model -> its name here.
        """
        digest = hashlib.sha256()
        for theirs, name in sorted(names.items()):
            kind, shape = self.layout[name]
            digest.update(json.dumps([theirs, str(TYPES[kind]), list(shape)]).encode())
            for block in self.blocks(name, rows_per_block(shape, entries)):
                digest.update(raw(block))
        return digest.hexdigest()


@contextlib.contextmanager
def opened(
    *groups: Sequence[str | os.PathLike[str]],
    by: Callable[[str | os.PathLike[str]], TensorFile] = TensorFile,
) -> Iterator[list[list[TensorFile]]]:
    """Open the files of each group of paths, and close them at the end."""
    with contextlib.ExitStack() as stack:
        yield [
            [stack.enter_context(contextlib.closing(by(path))) for path in group]
            for group in groups
        ]


def read_rows(
    files: Sequence[TensorFile],
    names: str | Sequence[str],
    start: int,
    stop: int,
    wanted: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Return rows start..stop of every file's tensor, or those `wanted` of each, see `take`.

    `names`: of the tensor, one or one per file.
    """
    names = [names] * len(files) if isinstance(names, str) else names
    if wanted is None:
        return [file.rows(name, start, stop) for file, name in zip(files, names, strict=True)]
    return [f.take(name, index) for f, name, index in zip(files, names, wanted, strict=True)]


def most_between() -> int:
    """Return how many bytes between those that are read a `RunningHash` reads at once.

    Of several processes each reads a part of every tensor, and never what lies between.
    """
    return PASSED if world() == 1 else 1 << 62


def own_hashed(files: Sequence[TensorFile]) -> Sequence[TensorFile]:
    """Return the files whose hash falls to this process, and hash what is read of them."""
    # Process 0 alone reads native checkpoints.
    native = any(file.checkpoint is not None for file in files)
    own = files[rank() :: world()] if not native else [] if rank() else files
    for file in own:
        file.start_hash()
    return own


def own_rows(files: int, length: int, step: int) -> slice:
    """Return this process's rows of a tensor in so many files, in whole steps.

    Processes that have more files to hash than others (`own_hashed`) have fewer rows.
    """
    loads = [HASHING * len(range(number, files, world())) for number in range(world())]
    even = files * (1 + HASHING) / world()
    free = [max(0.0, even - load) for load in loads]
    steps = -(-length // step)
    start, stop = (round(steps * sum(free[:n]) / sum(free)) for n in (rank(), rank() + 1))
    return slice(min(length, start * step), min(length, stop * step))


def joined_hashes(own: Sequence[TensorFile]) -> dict[Path, str]:
    """Return path -> sha256 of the files that each process has for its own."""
    with together():
        share = {file.path: file.sha256() for file in own}
    return {path: digest for part in gathered(share) for path, digest in part.items()}


def check_values(name: str, blocks: Sequence[Tensor], files: Sequence[TensorFile]) -> None:
    """Raise InputError for a NaN or an infinity in a block, which is of the file in its place."""
    odd = [number for number, block in enumerate(blocks) if not _is_finite(block)]
    if odd:
        check_no_nan(name, blocks, files)
        raise InputError(f"{files[odd[0]].path}: tensor {name!r} holds an infinity")


def _is_finite(block: Tensor) -> bool:
    """Five times as fast as `isfinite`: the bounds are a NaN where any value is."""
    if not block.numel() or not block.is_floating_point():
        return True
    low, high = torch.aminmax(block)
    return math.isfinite(low) and math.isfinite(high)


def check_no_nan(name: str, blocks: Sequence[Tensor], files: Sequence[TensorFile]) -> None:
    """Raise InputError for a NaN in a block, which is of the file in its place."""
    for file, block in zip(files, blocks, strict=False):
        if bool(block.isnan().any()):
            raise InputError(f"{file.path}: tensor {name!r} holds a NaN")


def spans(shape: Sequence[int], step: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of blocks of `step` rows; one block for a number."""
    length = shape[0] if shape else 1
    for start in range(0, length, step):
        yield start, min(start + step, length)


def rows_per_block(shape: Sequence[int], entries: int) -> int:
    """Return the number of rows of this shape that hold about `entries` numbers; at least one."""
    return max(1, entries // max(1, math.prod(shape[1:])))


def raw(tensor: Tensor) -> memoryview:
    """Return the tensor's bytes in row-major order."""
    # Through bytes, as numpy has no bfloat16.
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def in_file_order(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """Return the names as files have them: the widest types first, so that no gaps are needed."""
    return sorted(layout, key=lambda name: (-TYPES[layout[name][0]].itemsize, name))


def write_header(
    stream: BinaryIO,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> list[str]:
    """Write a safetensors header; the names in the order in which the tensors' bytes must follow.

    Format: the header's length as 8 bytes, little-endian; JSON, name -> type, shape and place,
    padded with spaces to a multiple of 8 bytes; the bytes of the tensors without gaps.
    """
    sizes = {name: TYPES[kind].itemsize for name, (kind, _) in layout.items()}
    order = in_file_order(layout)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name in order:
        kind, shape = layout[name]
        end = place + sizes[name] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)
    return order
