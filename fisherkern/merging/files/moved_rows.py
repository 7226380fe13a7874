"""Rows that stand in another order in a file, gathered for the result a block at a time."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkern.files import read_into
from fisherkern.members.catalogue import ItemRows
from fisherkern.merging.files import tensor_files
from fisherkern.merging.files.tensor_files import TYPES, TensorFile, check_no_nan, spans

# Bytes that a file is read in to be dealt out, and bytes of all files gathered at once.
DEALT, GATHERED = 1 << 27, 1 << 29
# A smaller tensor is read a row at a time: its pages stay in memory.
SMALL = 1 << 26
# Blocks of the result that are looked at, and rows that follow one another in a file on average
# there, below which the tensor is dealt out.
SAMPLED, RUN = 16, 4


class RowReaders(contextlib.ExitStack):
    """One tensor of several files, read for ascending blocks of the result; closed at the end.

    Files in the order of the result are read as they are, and so are those with long runs in that
    order. Of a file in any other order every row is copied once to a file without a name beside the
    result, whose parts each have the rows of one window of the result: the disk reads and writes in
    large pieces, however the rows are mixed. It takes as many bytes as the tensor.
    """

    def __init__(
        self,
        files: Sequence[TensorFile],
        names: Sequence[str],
        maps: Sequence[ItemRows] | None,
        part: slice,
        step: int,
        folder: Path,
    ) -> None:
        """Plan what is read of the files, and where.

        `maps`: the row of each file that each row of the result comes from. `part`: rows of the
        result that are asked for, in blocks of `step`. `folder`: for what is copied.
        """
        super().__init__()
        self._files, self._names, self._maps = files, names, maps
        self._dealt: dict[int, _DealtRows] = {}
        with contextlib.ExitStack() as stack:
            for number, rows in enumerate(maps or []):
                file, name = files[number], names[number]
                if _is_scattered(file, name, rows, step):
                    window = max(1, GATHERED // len(files) // (step * _row_bytes(file, name)))
                    own = _DealtRows(file, name, rows, part, step * window, folder)
                    self._dealt[number] = stack.enter_context(contextlib.closing(own))
            self.push(stack.pop_all())

    def read(self, start: int, stop: int) -> list[Tensor]:
        """Return the rows start..stop of the result in every file, zeros where there is none."""
        found = []
        for number, (file, name) in enumerate(zip(self._files, self._names, strict=True)):
            if self._maps is None:
                found.append(file.rows(name, start, stop))
            elif number in self._dealt:
                found.append(self._dealt[number].read(start, stop))
            else:
                found.append(file.take(name, self._maps[number][start:stop]))
        return found


def own_places(index: Tensor) -> Tensor:
    """Return `index` of what has been read in its order: the row itself, -1 for none."""
    return torch.where(index < 0, -1, torch.arange(len(index)))


def check_unread(base: TensorFile, name: str, rows: ItemRows, step: int) -> None:
    """Raise InputError for a NaN in a row of the base that no member has, read for nothing else."""
    shape = base.layout[name][1]
    unread = torch.ones(shape[0], dtype=torch.bool)
    for start, stop in spans((len(rows),), step):
        index = rows[start:stop]
        unread[index[index >= 0]] = False
    for start, stop in spans(shape, step):
        if unread[start:stop].any():
            check_no_nan(name, [base.rows(name, start, stop)], [base])


def _row_bytes(file: TensorFile, name: str) -> int:
    kind, shape = file.layout[name]
    return torch.Size(shape[1:]).numel() * TYPES[kind].itemsize


def _is_scattered(file: TensorFile, name: str, rows: ItemRows, step: int) -> bool:
    """Whether blocks of the result have their rows in many places of the file."""
    size = _row_bytes(file, name)
    if size * len(rows) < SMALL:
        return False
    blocks = list(spans((len(rows),), step))
    seen = pieces = 0
    for start, stop in blocks[:: max(1, len(blocks) // SAMPLED)]:
        index = rows[start:stop]
        places = index[index >= 0].sort().values
        seen += len(places)
        pieces += int((places.diff() > max(1, tensor_files.PAGE // size)).sum())
    return pieces * RUN > seen


class _DealtRows:
    """The rows of a tensor in a file of their own, sorted by the window of the result they are of.

    In a window's part they stand by the piece of the tensor they were read in, then in the order of
    the result.
    """

    def __init__(
        self, file: TensorFile, name: str, rows: ItemRows, part: slice, window: int, folder: Path
    ) -> None:
        """`window`: rows of the result, a number of whole blocks."""
        self._rows, self._size = rows, _row_bytes(file, name)
        self._part, self._window, self._path = part, window, folder
        self._kind, (length, *shape) = file.layout[name]
        self._shape = shape
        self._piece = max(1, DEALT // self._size)
        self._now: tuple[int, Tensor] | None = None
        counts = [int((rows[a:b] >= 0).sum()) for a, b in self._windows()]
        self._ends = list(itertools.accumulate(counts))
        # Without a name, so that nothing is left even where the process is killed.
        self._stream: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        try:
            total = sum(counts) * self._size
            if total and hasattr(os, "posix_fallocate"):
                # A full disk is found before the work.
                os.posix_fallocate(self._stream.fileno(), 0, total)
            self._deal(file, name, length)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the file back."""
        self._stream.close()

    def _windows(self) -> list[tuple[int, int]]:
        first = self._part.start
        return [(first + a, first + b) for a, b in spans((self._part.stop - first,), self._window)]

    def _deal(self, file: TensorFile, name: str, length: int) -> None:
        small = max(length, len(self._rows)) < 2**31
        target = torch.full((length,), -1, dtype=torch.int32 if small else torch.int64)
        for start, stop in self._windows():
            index = self._rows[start:stop]
            have = index >= 0
            target[index[have]] = torch.arange(start, stop, dtype=target.dtype)[have]
        places = [0, *self._ends[:-1]]
        for start, stop in spans((length,), self._piece):
            own = target[start:stop].long()
            have = (own >= 0).nonzero()[:, 0]
            if not len(have):
                continue
            wanted, order = own[have].sort()
            block = file.rows(name, start, stop).view(stop - start, -1).view(torch.uint8)
            sorted_rows = memoryview(block[have[order]].numpy().reshape(-1).data)
            del block
            wanted = (wanted - self._part.start) // self._window
            windows, counts = wanted.unique_consecutive(return_counts=True)
            done = 0
            for window, count in zip(windows.tolist(), counts.tolist(), strict=True):
                part = sorted_rows[done * self._size : (done + count) * self._size]
                self._stream.seek(places[window] * self._size)
                while part:  # one call writes at most 2 GB
                    part = part[self._stream.write(part) :]
                places[window] += count
                done += count

    def read(self, start: int, stop: int) -> Tensor:
        """Return the rows start..stop of the result, which are of one window."""
        window = (start - self._part.start) // self._window
        if self._now is None or self._now[0] != window:
            self._now = None
            self._now = window, self._gathered(window)
        first = self._part.start + window * self._window
        return self._now[1][start - first : stop - first]

    def _gathered(self, window: int) -> Tensor:
        start, stop = self._windows()[window]
        index = self._rows[start:stop]
        have = (index >= 0).nonzero()[:, 0]
        result = torch.zeros(len(index), *self._shape, dtype=TYPES[self._kind])
        if not len(have):
            return result
        content = bytearray(len(have) * self._size)
        place = (self._ends[window] - len(have)) * self._size
        read_into(self._stream, memoryview(content), place, self._path)
        order = (index[have] // self._piece).argsort(stable=True)
        table = result.view(len(index), -1).view(torch.uint8)
        table[have[order]] = torch.frombuffer(content, dtype=torch.uint8).view(-1, self._size)
        return result
