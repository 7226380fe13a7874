"""Safetensors files as the places of their tensors' bytes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisherkern.adapters.mapped import MappedFile, Region, Slot, contiguous_stride, shown
from fisherkern.errors import InputError

# Texts become ten times their size in memory; 100,000 tensors take 15 MB.
MAX_JSON = 1 << 25
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass
class SafetensorsFile:
    """A file's tensors in its order of names, and the texts of its header."""

    file: MappedFile
    slots: dict[str, Slot]
    metadata: dict[str, str]


def parse_json(path: Path, content: bytes | bytearray) -> Any:
    """JSON of a file that somebody sent, of whatever depth and with numbers of any length."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "beyond all limits"
        raise InputError(f"{path}: not valid JSON: {reason}") from None


def read_safetensors(file: MappedFile) -> SafetensorsFile:
    """Read the header of a safetensors file and hold its places to the file's size."""
    path = file.path
    broken = InputError(f"{path}: not a whole safetensors file")
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else 0
    if not 2 <= length <= min(MAX_JSON, file.size - 8):
        raise broken
    header = parse_json(path, file.read(8, 8 + length))
    if not isinstance(header, dict):
        raise broken
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise broken
    slots: dict[str, Slot] = {}
    start = 8 + length
    for name, entry in header.items():
        try:
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise broken from None
        dtype = _TYPES.get(kind) if isinstance(kind, str) else None
        if dtype is None:
            raise InputError(f"{path}: tensor {shown(name)} is of the unknown type {shown(kind)}")
        numbers = (*shape, begin, end) if isinstance(shape, list) else (None,)
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or begin > end:
            raise broken
        if math.prod(shape) * dtype.itemsize != end - begin or start + end > file.size:
            raise InputError(f"{path}: tensor {shown(name)} does not fit its place in the file")
        region = Region(file, start + begin, end - begin)
        slots[name] = Slot(region, dtype, 0, tuple(shape), contiguous_stride(tuple(shape)))
        problem = slots[name].problem()
        if problem:
            raise InputError(f"{path}: tensor {shown(name)} {problem}")
    position = start
    for region in sorted((s.region for s in slots.values()), key=lambda r: (r.start, r.size)):
        if region.start != position:
            raise InputError(f"{path}: its tensors overlap, or leave gaps between them")
        position += region.size
    if position != file.size:
        raise broken
    return SafetensorsFile(file, slots, metadata)
