"""Safetensors files as the places of their tensors' bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fisherkern.adapters.files.mapped import MappedFile, Region, Slot, contiguous_stride
from fisherkern.documents import header_length, parse_header
from fisherkern.errors import InputError, shown

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


def read_safetensors(file: MappedFile) -> SafetensorsFile:
    """Read the header of a safetensors file and hold its places to the file's size."""
    length = header_length(file.path, file.size, file.read(0, min(8, file.size)))
    header = parse_header(file.path, file.size, file.read(8, 8 + length))
    slots: dict[str, Slot] = {}
    for name, own in header.tensors.items():
        region = Region(file, own.start, own.stop - own.start)
        slots[name] = Slot(region, _TYPES[own.dtype], 0, own.shape, contiguous_stride(own.shape))
        problem = slots[name].problem()
        if problem:
            raise InputError(f"{file.path}: tensor {shown(name)} {problem}")
    return SafetensorsFile(file, slots, header.metadata)
