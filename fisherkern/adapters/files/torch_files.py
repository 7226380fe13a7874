"""What `torch.save` writes, as inert values and the places of its tensors' bytes.

Two containers: zip archives (PyTorch 1.6 and later) and the plain pickles before them, which
`torch.save(..., _use_new_zipfile_serialization=False)` still writes.
"""

from __future__ import annotations

import mmap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, cast

import torch

from fisherkern.adapters.files import pickles
from fisherkern.adapters.files.mapped import MAX_DEFLATION, MappedFile, Region, Slot
from fisherkern.adapters.files.pickles import Global, Pairs, PickleError
from fisherkern.errors import InputError, shown

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MAGIC_BYTES = MAGIC.to_bytes(10, "little")
# A directory's entry is ten times its size in memory; 100,000 storages take 6 MB.
MAX_DIRECTORY = 1 << 24
HEAD = 1000  # opcodes of the small programs before the large one
ZIP_START = b"PK\x03\x04"

STORAGE_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}
QUANTISED = ("QInt8Storage", "QInt32Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage")
UNTYPED = ("UntypedStorage", "_UntypedStorage")


@dataclass(frozen=True)
class Refused:
    """A tensor of a kind that cannot be merged; refused only if it is asked for."""

    kind: str


@dataclass(frozen=True)
class StorageRef:
    """A storage that a program refers to; dtype None for bytes without a type."""

    region: Region
    dtype: torch.dtype | None
    offset: int = 0


@dataclass
class TorchFile:
    """The value that was saved, inert, and the file that it came from.

    entries: the parts of a zip archive by name, None for the old container.
    """

    file: MappedFile
    value: Any
    entries: dict[str, Region] | None


# Functions that stand for torch's and the standard library's in a program.


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> Slot | Refused:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    if isinstance(storage, Refused):
        return storage
    metadata = more[2] if len(more) > 2 else None
    if isinstance(metadata, Pairs) and metadata.pairs:
        return Refused("a conjugate or negative view")
    if storage.dtype is None:
        raise PickleError("has a tensor without a type")
    return _slot(storage, storage.dtype, offset, shape, stride)


def _tensor_with_dtype(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Slot:
    """torch._utils._rebuild_tensor_v3."""
    known = STORAGE_DTYPES.get(dtype.name) if dtype.module == "torch" else None
    if known is None:
        raise PickleError(f"has a tensor of the type {shown(dtype.name)}, unknown to PyTorch")
    return _slot(storage, known, offset, shape, stride)


def _slot(storage: StorageRef, dtype: torch.dtype, offset: Any, shape: Any, stride: Any) -> Slot:
    slot = Slot(storage.region, dtype, storage.offset + offset, tuple(shape), tuple(stride))
    problem = slot.problem()
    if problem:
        raise PickleError(f"has a tensor that {problem}")
    return slot


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _typed(function: Any, kind: Any, args: Any, *_: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, or of a subclass."""
    if kind.key not in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter")):
        return Refused(f"of the class {shown(kind.name)}")
    rebuild = FUNCTIONS.get(function.key)
    if rebuild is None or rebuild is _typed:
        return Refused("rebuilt by an unknown function")
    return rebuild(*args)


def _refused(kind: str) -> Callable[..., Refused]:
    return lambda *args: Refused(kind)


def _mapping(pairs: Any = (), *_: Any) -> Pairs:
    """collections.OrderedDict, of nothing or of [key, value] pairs."""
    return Pairs([(key, value) for key, value in pairs])


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """_codecs.encode, by which protocol 2 writes bytes."""
    if encoding not in ("latin1", "latin-1") or type(text) is not str:
        raise PickleError("has bytes in an unknown encoding")
    return text.encode("latin-1")


FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_with_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
    ("torch._utils", "_rebuild_qtensor"): _refused("quantised"),
    ("torch._utils", "_rebuild_sparse_tensor"): _refused("sparse"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _refused("sparse"),
    ("torch._utils", "_rebuild_nested_tensor"): _refused("nested"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _refused("without values (meta)"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _refused("of a subclass without a storage"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _refused("of another device"),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _refused("of another device"),
    ("torch._utils", "_rebuild_xla_tensor"): _refused("of another device"),
    ("torch.storage", "_load_from_bytes"): _refused("pickled without torch.save"),
    ("collections", "OrderedDict"): _mapping,
    ("collections", "defaultdict"): lambda *args: Pairs(),
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("_codecs", "encode"): _encoded,
}


def _storage_dtype(kind: Any) -> torch.dtype | Refused | None:
    """Return what a storage class of a persistent id holds; None for bytes."""
    if type(kind) is not Global or kind.module not in ("torch", "torch.cuda", "torch.storage"):
        raise PickleError("refers to a storage of an unknown class")
    if kind.name in QUANTISED:
        return Refused("quantised")
    if kind.name in UNTYPED:
        return None
    if kind.name not in STORAGES:
        raise PickleError(f"refers to a storage of the unknown class {shown(kind.name)}")
    return STORAGES[kind.name]


def read_torch_file(file: MappedFile) -> TorchFile | None:
    """Read what torch.save wrote; None for a file that is of neither container."""
    start = bytes(file.read(0, min(file.size, 512)))
    if start.startswith(ZIP_START):
        reader: Callable[[MappedFile], TorchFile] = _read_zip
    elif start[:1] == b"\x80" and MAGIC_BYTES in start[:32]:
        reader = _read_legacy
    elif start[257:262] == b"ustar":
        raise InputError(f"{file.path}: a tar file, as PyTorch wrote before 2017, is not read")
    elif start[:1] == b"\x80" and start[1:2] <= b"\x05":
        raise InputError(f"{file.path}: a pickle that torch.save did not write")
    else:
        return None
    try:
        return reader(file)
    except PickleError as error:
        raise InputError(f"{file.path}: its pickle {error}") from None


def _read_zip(file: MappedFile) -> TorchFile:
    entries = _zip_entries(file)
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    roots = [root for root in roots if root.count("/") == 1]
    if len(roots) != 1:
        raise InputError(f"{file.path}: a zip file that torch.save did not write")
    root = roots[0]
    if root + "constants.pkl" in entries:
        raise InputError(f"{file.path}: a TorchScript archive, which holds code and no checkpoint")
    order = entries.get(root + "byteorder")
    if order is not None and bytes(order.read()) != b"little":
        raise InputError(f"{file.path}: was written on a big-endian machine")

    def storage(reference: Any) -> StorageRef | Refused:
        tag, kind, key, _, count = reference
        region = entries.get(f"{root}data/{key}") if type(key) is str else None
        if tag != "storage" or type(count) is not int:
            raise PickleError("refers to something other than a storage")
        dtype = _storage_dtype(kind)
        if isinstance(dtype, Refused):
            return dtype
        if region is None:
            raise PickleError(f"refers to the storage {shown(key)}, which is missing")
        if region.size != count * (1 if dtype is None else dtype.itemsize):
            raise PickleError(f"expects the storage {shown(key)} to have another size")
        return StorageRef(region, dtype)

    program = bytes(entries[root + "data.pkl"].read())
    value, _ = pickles.run_program(program, 0, FUNCTIONS, storage)
    return TorchFile(file, value, entries)


def _directory_size(file: MappedFile) -> int:
    """Bytes of a zip file's directory, as its end says; 0 where that is missing."""
    tail = file.read(max(0, file.size - (1 << 16) - 98), file.size)
    end, long_end = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    size = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    long_size = int.from_bytes(tail[long_end + 40 : long_end + 48], "little")
    return max(size, long_size) if size == 0xFFFFFFFF and long_end >= 0 else size


def _zip_entries(file: MappedFile) -> dict[str, Region]:
    """Return the parts of a zip archive by name, in its order, checked against the file."""
    broken = InputError(f"{file.path}: not a whole zip file, perhaps cut short")
    if _directory_size(file) > MAX_DIRECTORY:
        raise InputError(f"{file.path}: a zip file of too many parts")
    try:
        with file.opened() as stream, zipfile.ZipFile(cast(IO[bytes], stream)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, ValueError) as error:
        raise broken from error
    entries: dict[str, Region] = {}
    stored = 0
    for info in infos:
        name = info.filename
        if name in entries:
            raise InputError(f"{file.path}: holds {shown(name)} twice")
        if info.flag_bits & 1 or info.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise InputError(
                f"{file.path}: {shown(name)} is encrypted or compressed by a rare method"
            )
        header = (
            file.read(info.header_offset, min(info.header_offset + 30, file.size))
            if (0 <= info.header_offset < file.size)
            else b""
        )
        if len(header) < 30 or not header.startswith(ZIP_START):
            raise broken
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + 30 + lengths
        stored += info.compress_size
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        if start + info.compress_size > file.size or stored > file.size:
            raise broken
        if not deflated and info.file_size != info.compress_size:
            raise broken
        if deflated and info.file_size > MAX_DEFLATION * info.compress_size + (1 << 20):
            raise InputError(f"{file.path}: {shown(name)} is compressed beyond all reason")
        entries[name] = Region(
            file, start, info.file_size, info.compress_size if deflated else None
        )
    return entries


def _read_legacy(file: MappedFile) -> TorchFile:
    with (
        file.path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        magic, position = pickles.run_program(data, limit=HEAD)
        protocol, position = pickles.run_program(data, position, limit=HEAD)
        system, position = pickles.run_program(data, position, limit=HEAD)
        if magic != MAGIC or protocol != PROTOCOL or not isinstance(system, Pairs):
            raise PickleError("has an unknown version")
        if system.texts().get("little_endian") is not True:
            raise InputError(f"{file.path}: was written on a big-endian machine")
        # Storages stand behind the program, in the order of a list behind it.
        regions: dict[str, tuple[Region, int]] = {}
        value, end = pickles.run_program(
            data, position, FUNCTIONS, lambda reference: _legacy_storage(file, reference, regions)
        )
        keys, end = pickles.run_program(data, end)
    if type(keys) is not list or len(keys) != len(regions):
        raise PickleError("lists other storages than it uses")
    places = set()
    for key in keys:
        if type(key) is not str or key not in regions or key in places:
            raise PickleError("lists other storages than it uses")
        places.add(key)
        region, count = regions[key]
        region.start = end + 8
        if region.start + region.size > file.size:
            raise InputError(f"{file.path}: not whole, it ends inside a storage")
        if int.from_bytes(file.read(end, region.start), "little") != count:
            raise PickleError(f"expects the storage {shown(key)} to have another size")
        end = region.start + region.size
    return TorchFile(file, value, None)


def _legacy_dtype(kind: Any) -> tuple[torch.dtype | Refused | None, int]:
    """Return the type of a storage and the bytes of one element."""
    dtype = _storage_dtype(kind)
    if isinstance(dtype, Refused):
        return dtype, STORAGE_DTYPES[kind.name.removesuffix("Storage").lower()].itemsize
    return dtype, 1 if dtype is None else dtype.itemsize


def _legacy_storage(
    file: MappedFile, reference: Any, regions: dict[str, tuple[Region, int]]
) -> Any:
    """Return the storage that a program refers to, in a region whose place is not known yet."""
    tag, kind, key, *more = reference
    if tag == "module":  # (class, its source's file, its source's text)
        return kind
    _, count, view = more
    if tag != "storage" or type(key) is not str or type(count) is not int:
        raise PickleError("refers to something other than a storage")
    dtype, itemsize = _legacy_dtype(kind)
    if not 0 <= count * itemsize <= file.size:
        raise PickleError(f"expects the storage {shown(key)} to be larger than the file")
    region, known = regions.setdefault(key, (Region(file, 0, count * itemsize), count))
    if known != count or region.size != count * itemsize:
        raise PickleError(f"refers to the storage {shown(key)} in two sizes")
    if isinstance(dtype, Refused):
        return dtype
    _, offset, length = view or (None, 0, count)
    if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
        raise PickleError("refers to something other than a storage")
    if offset + length > count:
        raise PickleError("refers to a part beyond its storage")
    return StorageRef(region, dtype, offset)
