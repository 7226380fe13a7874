"""The item ids beside model files: read a piece at a time and numbered, since they may be many."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherkern.documents import MAX_SETTINGS, check_tree, parse_json
from fisherkern.errors import InputError, shown
from fisherkern.files import is_file, read_json
from fisherkern.fingerprint import ItemIdsHash, item_ids_sha256
from fisherkern.merging.files.tensor_files import spans

# Bytes of JSON read at once: a million ids or so, which are found faster together.
PIECE = 1 << 24
_DECODE = json.JSONDecoder().raw_decode
_KEY = re.compile(rb'"item_ids"\s*:\s*\[')


class _IrregularError(Exception):
    """The JSON is not read by pieces: it is broken, or its item ids are no list of strings."""


class ItemIdFile:
    """The JSON beside a model file; holds a piece of its item ids at a time.

    about: the JSON without its item ids. sha256: `item_ids_sha256` of them. count: their number,
    None where there is no list. All are known once `pieces` has come to its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: dict[str, Any] = {}
        self.sha256: str | None = None
        self.count: int | None = None

    def pieces(self) -> Iterator[list[str]]:
        """Yield the ids in order, some at a time; none where there is no list of them.

        Raises:
            InputError: There is no such file, or it is no JSON object.
        """
        if not is_file(self.path):
            raise InputError(f"{self.path}: no such file")
        digest, count = ItemIdsHash(), 0
        try:
            with self.path.open("rb", buffering=0) as stream:
                for piece in self._strings(stream):
                    digest.update(piece)
                    count += len(piece)
                    yield piece
        except _IrregularError:
            content = read_json(self.path)
            if not isinstance(content, dict):
                raise InputError(f"{self.path}: not a JSON object") from None
            ids = content.pop("item_ids", None)
            self.about, self.sha256 = content, item_ids_sha256(ids)
            if ids is None and not count:
                return
            if count or not isinstance(ids, list) or not all(isinstance(own, str) for own in ids):
                raise InputError(f"{self.path}: its item_ids are not a list of strings") from None
            count = len(ids)
            yield ids
        except OSError as error:
            raise InputError(f"{self.path}: could not be read: {error.strerror}") from None
        else:
            self.sha256 = digest.hexdigest()
        self.count = count

    def at(self, place: int) -> str:
        """Return the id at a place of the list; reads all before it again."""
        for piece in self.pieces():
            if place < len(piece):
                return piece[place]
            place -= len(piece)
        raise InputError(f"{self.path}: became shorter while it was read")

    def _strings(self, stream: BinaryIO) -> Iterator[list[str]]:
        head, more = b"", stream.read(PIECE)
        while (key := _KEY.search(head)) is None:
            if not more or len(head) > MAX_SETTINGS:
                raise _IrregularError
            head, more = head + more, stream.read(PIECE)
        start = head[: key.end() - 1] + b"null"
        try:
            parse_json(self.path, start + b"}")  # else it is the key of some object within
            tail = yield from _array(stream, head[key.end() :] + more, self.path)
            self.about = parse_json(self.path, start + tail + stream.read(MAX_SETTINGS))
        except InputError:  # whose line is not the file's
            raise _IrregularError from None
        del self.about["item_ids"]


def _array(stream: BinaryIO, buffer: bytes, path: Path) -> Generator[list[str], None, bytes]:
    """Yield the strings of a JSON array of which `buffer` and the stream follow the bracket.

    Returns what has been read of what is behind the array.
    """
    first = True
    while True:
        try:
            values, used, closed = _whole_strings(buffer)
        except ValueError:
            more = stream.read(PIECE)
            if not more or len(buffer) > MAX_SETTINGS:
                raise _IrregularError from None
            buffer += more
            continue
        if set(map(type, values)) - {str} or not (values or (first and closed)):
            raise _IrregularError
        if b"\\u" in buffer:
            check_tree(path, values)
        yield values
        buffer, first = buffer[used:], False
        if closed:
            return buffer
        buffer += stream.read(PIECE)


def _whole_strings(buffer: bytes) -> tuple[list[Any], int, bool]:
    """(Values that are whole in a piece of an array, bytes that they take, whether it ends there).

    Raises ValueError where none is whole, or the piece is broken.
    """
    cut = buffer.rfind(b",")
    text = "[" + (buffer if cut < 0 else buffer[:cut] + b"]").decode()
    try:
        values, end = _DECODE(text)
    except json.JSONDecodeError as error:
        # The last comma was part of a string, whose first letter the error tells.
        cut = text.rfind(",", 0, error.pos)
        if not error.msg.startswith("Unterminated") or cut < 0:
            raise
        text = text[:cut] + "]"
        values, end = _DECODE(text)
    # A bracket put in the place of a comma takes as many bytes.
    return values, len(text[1:end].encode()), cut < 0 or end < len(text)


class ItemNumbers:
    """Numbers item ids as they come, first ones first; holds 20 bytes an id and not the ids.

    Ids are told apart by 128 bits of Python's hash, keyed anew in each process: of 10⁹ ids two are
    mixed up once in 10²⁰ merges.
    """

    def __init__(self, most: int) -> None:
        """`most`: as many ids as come, or more."""
        self.count = 0
        self._dtype = np.int32 if most < 2**31 else np.int64
        # Of every file, what the files before lacked: sorted first halves of the hashes, second
        # halves, numbers.
        self._tables: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []

    def add(self, file: ItemIdFile, size: int) -> Tensor:
        """Return the (size,) numbers of a file's ids; those that are new are numbered on.

        Raises:
            InputError: An id is listed twice, or there are not `size` of them.
        """
        numbers = np.empty(size, self._dtype)
        new = [np.empty(size, np.int64) for _ in range(2)]  # memory is taken as it is filled
        done = fresh = 0
        for ids in file.pieces():
            if done + len(ids) <= size:
                first = np.fromiter(map(hash, ids), np.int64, len(ids))
                second = np.fromiter((hash(own + "\n") for own in ids), np.int64, len(ids))
                found = self._find(first, second)
                unknown = (found < 0).nonzero()[0]
                stop = fresh + len(unknown)
                found[unknown] = np.arange(self.count + fresh, self.count + stop)
                numbers[done : done + len(ids)] = found
                new[0][fresh:stop], new[1][fresh:stop] = first[unknown], second[unknown]
                fresh = stop
            done += len(ids)
        if file.count is None:
            raise InputError(f"{file.path}: its item_ids are not a list of strings")
        if done != size:
            raise InputError(f"{file.path} has {size} items but {done} item_ids")
        self._keep(new, fresh)
        self.count += fresh
        self._check_once(file, numbers)
        return torch.from_numpy(numbers)

    def forget(self) -> None:
        """Release what ids are found by, when no more come."""
        self._tables.clear()

    def _keep(self, new: list[NDArray[np.int64]], fresh: int) -> None:
        """Sorts in place, and gives back what is not needed any more: this is the most held."""
        second, first = new.pop()[:fresh], new.pop()[:fresh]
        order = first.argsort()
        first.sort()
        second = second[order]
        order += self.count
        self._tables.append((first, second, order.astype(self._dtype)))

    def _find(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) numbers, -1 for none."""
        found = np.full(len(first), -1)
        order = first.argsort()  # so that what is near in the table is asked for together
        first, second = first[order], second[order]
        for keys, others, numbers in self._tables:
            if not len(keys):
                continue
            place = keys.searchsorted(first)
            while True:
                inside = place.clip(max=len(keys) - 1)
                alike = (place < len(keys)) & (keys[inside] == first)
                hit = alike & (others[inside] == second)
                found[order[hit]] = numbers[inside[hit]]
                if not (alike & ~hit).any():
                    break
                place += alike & ~hit
        return found

    def _check_once(self, file: ItemIdFile, numbers: NDArray[Any]) -> None:
        """Each id is listed once: neither an older number twice, nor the same hash as a new one."""
        keys, others, own = self._tables[-1]
        twice = ((keys[1:] == keys[:-1]) & (others[1:] == others[:-1])).nonzero()[0]
        if len(twice):
            place = int((numbers == own[twice[0]]).nonzero()[0][0])
        else:
            position, place = inverse(torch.from_numpy(numbers), self.count), -1
            for start, stop in spans((len(numbers),), PIECE):
                found = position[torch.from_numpy(numbers[start:stop])]
                again = (found != torch.arange(start, stop)).nonzero()
                if len(again):
                    place = start + int(again[0])
                    break
            if place < 0:
                return
        raise InputError(f"{file.path} has item id {shown(file.at(place))} twice in its item_ids")


def inverse(numbers: Tensor, size: int) -> Tensor:
    """Return (size,), where each number stands in `numbers`, -1 where it does not."""
    found = torch.full((size,), -1, dtype=numbers.dtype)
    found[numbers] = torch.arange(len(numbers), dtype=numbers.dtype)
    return found


class MergedIds:
    """The item ids of the united catalogue: the first file's, then those new in each further one.

    Read from the files again whenever they are asked for.
    """

    def __init__(self, files: Sequence[ItemIdFile], news: Sequence[Tensor]) -> None:
        """`news`: per file after the first, the ascending places of the ids that are new there."""
        self.files, self.news = files, news

    def pieces(self) -> Iterator[list[str]]:
        """Yield the ids in order, some at a time."""
        yield from self.files[0].pieces()
        for file, new in zip(self.files[1:], self.news, strict=True):
            if not len(new):
                continue
            start = 0
            for ids in file.pieces():
                ends = torch.tensor([start, start + len(ids)], dtype=new.dtype)
                low, high = torch.searchsorted(new, ends).tolist()
                yield [ids[place - start] for place in new[low:high].tolist()]
                start += len(ids)

    def at(self, number: int) -> str:
        """Return the id of a number; reads all before it again."""
        for ids in self.pieces():
            if number < len(ids):
                return ids[number]
            number -= len(ids)
        raise InputError(f"{self.files[0].path}: became shorter while it was read")

    def sha256(self) -> str:
        """Return `item_ids_sha256` of them."""
        digest = ItemIdsHash()
        for ids in self.pieces():
            digest.update(ids)
        return digest.hexdigest()
