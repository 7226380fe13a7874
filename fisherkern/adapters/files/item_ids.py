"""Item ids: of what a user gives, and out of the inert values of a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Set
from typing import Any

import numpy
from torch import Tensor

from fisherkern.adapters.files.pickles import Stub
from fisherkern.errors import InputError, shown

Ids = tuple[int | float | str | bool | None, ...]
ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
BUFFERS = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
_SCALAR_CALLS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")


def id_list(given: Any) -> list[Any]:
    """Return the ids in a list, an array or a column of a frame.

    Raises:
        InputError: It is something else, such as a mapping, whose order says nothing; or an entry
            is no id.
    """
    unordered = isinstance(given, str | bytes | Mapping | Set)
    if unordered or not hasattr(given, "__iter__") or not hasattr(given, "__len__"):
        raise InputError(
            f"item_ids: a {type(given).__name__} where a list of ids, a RecBole data set or a "
            "RecTools id map was expected"
        )
    ids = given.tolist() if hasattr(given, "tolist") else list(given)
    ids = [own.item() if isinstance(own, numpy.generic | Tensor) else own for own in ids]
    odd = next((own for own in ids if not isinstance(own, Hashable)), None)
    if odd is not None:
        raise InputError(f"item_ids: {shown(odd)} is no id")
    return ids


def ids_of(value: Any) -> Ids | None:
    """Return a list, tuple or one-dimensional array of plain values; None for anything else."""
    if isinstance(value, Stub):
        value = _array(value)
    if not isinstance(value, list | tuple):
        return None
    ids = [_scalar(entry) if isinstance(entry, Stub) else entry for entry in value]
    plain = all(entry is None or type(entry) in (int, float, str, bool) for entry in ids)
    return tuple(ids) if plain else None


def _dtype(stub: Any) -> numpy.dtype[Any] | None:
    """numpy.dtype("i8", False, True) with its state (3, "<", ...); no records."""
    if not isinstance(stub, Stub) or not stub.is_call_of("numpy.dtype"):
        return None
    text = stub.args[0] if type(stub.args) is tuple and stub.args else None
    order = stub.state[1] if type(stub.state) is tuple and len(stub.state) > 1 else "="
    if type(text) is not str or not re.fullmatch(r"[iufbUSO]\d{1,6}", text):
        return None
    return numpy.dtype(text).newbyteorder(">" if order == ">" else "<")


def _array(stub: Stub) -> list[Any] | None:
    """Return the entries of a one-dimensional array."""
    if stub.is_call_of(*ARRAYS) and type(stub.state) is tuple and len(stub.state) == 5:
        _, shape, kind, _, content = stub.state
    elif stub.is_call_of(*BUFFERS) and type(stub.args) is tuple and len(stub.args) == 4:
        content, kind, shape, _ = stub.args
    else:
        return None
    dtype = _dtype(kind)
    if dtype is None or type(shape) is not tuple or len(shape) != 1:
        return None
    if dtype.hasobject:
        return content if type(content) is list and len(content) == shape[0] else None
    if type(content) is not bytes or type(shape[0]) is not int or not dtype.itemsize:
        return None
    if len(content) != math.prod(shape) * dtype.itemsize:
        return None
    return [e.decode("latin-1") if isinstance(e, bytes) else e for e in _entries(content, dtype)]


def _entries(content: bytes, dtype: numpy.dtype[Any]) -> list[Any]:
    try:
        entries: list[Any] = numpy.frombuffer(content, dtype).tolist()
        return entries
    except ValueError:  # code points beyond Unicode
        return [None]


def _scalar(stub: Stub) -> Any:
    """numpy.int64(3) and its like; the stub itself where it is something else."""
    if stub.is_call_of(*_SCALAR_CALLS) and type(stub.args) is tuple and len(stub.args) == 2:
        dtype, content = _dtype(stub.args[0]), stub.args[1]
        if dtype is None or dtype.hasobject or type(content) is not bytes:
            return stub
        if dtype.itemsize and len(content) == dtype.itemsize:
            return _entries(content, dtype)[0]
    return stub
