"""Texts that somebody sent: JSON and the headers of safetensors files, read within limits.

Every such text of the package comes through here. Only a regular file is opened, no more of it
is read than a text of its kind may have, and what is returned is a tree of plain values: no deeper
than `MAX_DEPTH`, no integer beyond 64 bits, no NaN or infinity, no half of a surrogate pair, no key
twice. Anything else is an `InputError` of one line.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from fisherkern.errors import InputError, shown

MAX_DEPTH = 64
# Bytes. A model's JSON has its item ids, fifty million perhaps.
MAX_JSON, MAX_SETTINGS = 1 << 31, 1 << 24
# A header becomes ten times its size in memory; 100,000 tensors take 15 MB.
MAX_HEADER = 1 << 25
INTEGERS = range(-(1 << 63), 1 << 64)
# A tensor's shape that PyTorch can count with.
MAX_AXES, MAX_AXIS = 64, 1 << 62
TYPE_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 1),
}


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a whole regular file of at most `limit` bytes; a pipe or a device would never end.

    Raises:
        InputError: no such file, another kind of file, a longer one, or one that cannot be read.
    """
    try:
        # Not blocking, as opening a pipe waits for its other end.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise InputError(f"{path}: not a regular file")
            content = stream.read(limit + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: not a regular file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: could not be read: {reason}") from None
    if len(content) > limit:
        raise InputError(f"{path}: longer than {limit:,} bytes")
    return content


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON) -> Any:
    """Read a JSON file; InputError names the file, and the line of a syntax error."""
    return parse_json(path, read_bytes(path, limit))


class _RefusedError(Exception):
    """What a hook of a parser found; the caller adds the file."""


def parse_json(where: object, content: str | bytes | bytearray) -> Any:
    """Return the plain values of a JSON text; `where` begins every message.

    Raises:
        InputError: no UTF-8, no JSON, or something beyond the limits of this module.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(
            text.removeprefix("\ufeff"),
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
            object_pairs_hook=_object,
        )
    except json.JSONDecodeError as error:
        raise InputError(f"{where}:{error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise InputError(f"{where}: not valid JSON: not UTF-8 text") from None
    except RecursionError:
        raise InputError(f"{where}: not valid JSON: nested too deep") from None
    except _RefusedError as refused:
        raise InputError(f"{where}: not valid JSON: {refused}") from None
    # Item ids may be millions; a text without braces or escapes has nothing to look for.
    if text.count("[") + text.count("{") > MAX_DEPTH or "\\u" in text:
        check_tree(where, value)
    return value


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else None
    if value is None or value not in INTEGERS:
        raise _RefusedError(f"a number of {len(text.lstrip('-'))} digits")
    return value


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _RefusedError(f"the number {shown(text)} is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise _RefusedError(f"{text} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RefusedError(f"the key {shown(twice)} stands twice in one object")
    return value


def check_tree(where: object, value: Any) -> None:
    """Hold a tree to the limits of this module; cycles are deeper than any of them."""
    waiting: list[Iterator[Any]] = [iter((value,))]
    while waiting:
        entry = next(waiting[-1], waiting)
        if entry is waiting:
            waiting.pop()
        elif isinstance(entry, str):
            if not entry.isascii() and any("\ud800" <= char <= "\udfff" for char in entry):
                raise InputError(f"{where}: half of a surrogate pair in {shown(entry)}")
        elif isinstance(entry, list | dict):
            if len(waiting) > MAX_DEPTH:
                raise InputError(f"{where}: nested deeper than {MAX_DEPTH} levels")
            waiting.append(_parts(entry))
        elif isinstance(entry, float) and not math.isfinite(entry):
            raise InputError(f"{where}: holds {entry}, which is not finite")
        elif isinstance(entry, int) and entry not in INTEGERS:
            raise InputError(f"{where}: holds {shown(entry)}, which is too large")


def _parts(entry: list[Any] | dict[str, Any]) -> Iterator[Any]:
    if isinstance(entry, list):
        return iter(entry)
    return (part for pair in entry.items() for part in pair)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file: its type there, its shape, and its bytes' place."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorHeader:
    """The header of a safetensors file; places count from the start of the file."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    def about(self, where: object) -> dict[str, Any]:
        """Return what fisherkern wrote there, {} in a file of others."""
        value = parse_json(
            f"{where}: its fisherkern metadata", self.metadata.get("fisherkern", "{}")
        )
        if not isinstance(value, dict):
            raise InputError(f"{where}: its fisherkern metadata is not a JSON object")
        return value


def header_length(where: object, size: int, head: bytes | bytearray) -> int:
    """Return the bytes of a safetensors header from the file's size and its first 8 bytes."""
    length = int.from_bytes(head[:8], "little") if len(head) >= 8 else 0
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise InputError(f"{where}: not a whole safetensors file")
    return length


def parse_header(where: object, size: int, content: bytes | bytearray) -> TensorHeader:
    """Read a safetensors header and hold its places to the file's size.

    Args:
        where: begins every message.
        size: bytes of the file.
        content: the header, without the 8 bytes before it.

    Raises:
        InputError: a header that no safetensors file of this size has: tensors of unknown types,
            or that overlap, leave gaps, or do not fill the file.
    """
    broken = InputError(f"{where}: not a whole safetensors file")
    header = parse_json(where, content)
    if not isinstance(header, dict):
        raise broken
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise broken
    first = 8 + len(content)
    tensors = {name: _stored(where, name, entry, first) for name, entry in header.items()}
    position = first
    for own in sorted(tensors.values(), key=lambda own: (own.start, own.stop)):
        if own.start != position:
            raise InputError(f"{where}: its tensors overlap, or leave gaps between them")
        position = own.stop
    if position != size:
        raise broken
    return TensorHeader(tensors, metadata)


def _stored(where: object, name: str, entry: Any, first: int) -> StoredTensor:
    broken = InputError(f"{where}: not a whole safetensors file")
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise broken
    kind, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in TYPE_SIZES:
        raise InputError(f"{where}: tensor {shown(name)} is of the unknown type {shown(kind)}")
    if not isinstance(shape, list) or not isinstance(places, list) or len(places) != 2:
        raise broken
    if len(shape) > MAX_AXES or not all(type(n) is int and 0 <= n < MAX_AXIS for n in shape):
        raise InputError(f"{where}: tensor {shown(name)} has a strange shape")
    if not all(type(n) is int and 0 <= n < MAX_AXIS for n in places) or places[0] > places[1]:
        raise broken
    # The product without its zeros too: PyTorch counts strides with it.
    if math.prod(n for n in shape if n) >= MAX_AXIS:
        raise InputError(f"{where}: tensor {shown(name)} has a strange shape")
    if math.prod(shape) * TYPE_SIZES[kind] != places[1] - places[0]:
        raise InputError(f"{where}: tensor {shown(name)} does not fit its place in the file")
    return StoredTensor(kind, tuple(shape), first + places[0], first + places[1])
