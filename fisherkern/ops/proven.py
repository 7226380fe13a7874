"""What has run on a GPU: the rows of proven.json, and whether they are about today's kernels.

Backend "auto" takes a kernel for tensors on a GPU only where a row covers the call: its op,
backend, architecture, dtype and width, the kernel's source as it is now, launched as the launch
table says now, and a size from which the kernel beat PyTorch there. benchmarks.gpu.prove writes
the rows from the results of a run; nothing else may. `kernel_status` says what "auto" does, op
by op.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from fisherkern.errors import InputError
from fisherkern.ops import build
from fisherkern.ops.launch_table import PRECISION, TARGET_PROGRAMS, rows_of_table

FILE = Path(__file__).with_name("proven.json")
SEGMENTS, LOOKUPS = "segment_outer_square_", "lookup_square_"

# Ops with a Triton kernel: the file's name without _triton.py, and their rows of the launch table.
TRITON: dict[str, tuple[str, tuple[str, ...]]] = {
    "softmax_lse": ("softmax_lse", ("softmax_lse",)),
    "softmax_mean": ("softmax_moments", ("softmax_lse", "softmax_mean")),
    "softmax_covariance": ("softmax_moments", ("softmax_covariance",)),
    "softmax_topk": ("softmax_topk", ("softmax_topk", "softmax_mean")),
    "softmax_sketch": ("softmax_sketch", ("softmax_sketch",)),
    "sample_items": ("sample_items", ("sample_items_total", "sample_items")),
    "sample_distinct": ("sample_distinct", ("sample_distinct",)),
    "head_sqgrad_": ("head_sqgrad", ("head_sqgrad_", "head_sqgrad_sparse")),
    SEGMENTS: ("segment_outer_square", (SEGMENTS,)),
}
# Ops whose kernels are compiled into fisherkern._C.
CUDA = (SEGMENTS, LOOKUPS)
KERNELS = (*((op, "triton") for op in TRITON), *((op, "cuda") for op in CUDA))

# "mixed": fp32 hidden states with bf16 items, as diag_fisher has them of a bf16 model.
DTYPES = ("float32", "bfloat16", "float16", "mixed", "tf32")
_ONE_DTYPE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# Widths that a kernel takes alike, whatever is checked of them holding for the others: D of the
# catalogue's ops and the lookups, padded and taken 64 columns at once; min(O, I) of segments,
# of which Triton makes nothing, and whose compiled kernel has a larger tile from 128 on.
WIDTHS = ((1, 32), (33, 64), (65, 128), (129, 256))
SEGMENT_WIDTHS = {"triton": ((1, 4096),), "cuda": ((1, 127), (128, 4096))}


Table = Sequence[tuple[str, int, str, tuple[int, ...]]]


@dataclass(frozen=True)
class Row:
    """A kernel that was right on a GPU.

    dtype: of the products' inputs, one of DTYPES ("tf32": fp32 segments that PyTorch allows tf32
    for). widths: the first and the last of a class, multiples of `multiple_of` alone. hash: of
    the kernel's source. launch: its rows of the launch table. faster_from: the size from which it
    beat PyTorch, None where it never did; N·V, R·N·T·O·I of segments, R·N·T·D of lookups.
    device: the GPU's name. evidence: the folder of results, from the repository's root.
    """

    op: str
    backend: str
    arch: int
    dtype: str
    widths: tuple[int, int]
    multiple_of: int
    hash: str
    launch: dict[str, tuple[int, ...]]
    faster_from: int | None
    device: str
    evidence: str

    def covers(self, op: str, backend: str, arch: int, dtype: str, width: int) -> bool:
        return (
            (self.op, self.backend, self.arch, self.dtype) == (op, backend, arch, dtype)
            and self.widths[0] <= width <= self.widths[1]
            and width % self.multiple_of == 0
        )


def read_proven(path: Path) -> list[Row]:
    """Return the rows of a file. Raises InputError where one is not what `Row` says."""
    found = []
    for number, entry in enumerate(json.loads(path.read_text(encoding="utf-8")), 1):
        if not isinstance(entry, dict) or entry.keys() != {field.name for field in fields(Row)}:
            raise InputError(f"{path}: row {number} has not the fields of a row")
        launch = {kernel: tuple(row) for kernel, row in entry["launch"].items()}
        row = Row(**(entry | {"widths": tuple(entry["widths"]), "launch": launch}))
        if (row.op, row.backend) not in KERNELS or row.dtype not in DTYPES:
            raise InputError(f"{path}: row {number} is of no kernel: {row.op} {row.backend}")
        if row.widths not in widths_of(row.op, row.backend):
            raise InputError(f"{path}: row {number}: {row.widths} is no class of widths")
        found.append(row)
    return found


def text_of(rows: Sequence[Row]) -> str:
    """Return what the file holds: a row a line, sorted."""
    lines = sorted(json.dumps(asdict(row)) for row in rows)
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


@functools.cache
def rows() -> tuple[Row, ...]:
    """Return the rows that the package came with."""
    return tuple(read_proven(FILE))


def widths_of(op: str, backend: str) -> tuple[tuple[int, int], ...]:
    """Return the classes of widths of an op's kernels."""
    return SEGMENT_WIDTHS[backend] if op == SEGMENTS else WIDTHS


def dtype_name(first: torch.dtype, second: torch.dtype) -> str | None:
    """Return what a row calls products of such matrices; None: nothing that rows are about."""
    if (first, second) == (torch.float32, torch.bfloat16):
        return "mixed"
    return _ONE_DTYPE.get(first) if first == second else None


def beats_torch(op: str, backend: str, arch: int, dtype: str | None, width: int, size: int) -> bool:
    """Whether a row covers such a call, and its kernel is the faster one at this size."""
    return dtype is not None and size >= _faster_from(op, backend, arch, dtype, width)


@functools.cache
def _faster_from(op: str, backend: str, arch: int, dtype: str, width: int) -> float:
    """Return the size from which "auto" takes the kernel: infinite where it never does."""
    own = [row for row in rows() if row.covers(op, backend, arch, dtype, width)]
    sizes = [row.faster_from for row in own if stale(row, kernel_hash(op, backend)) is None]
    return min((size for size in sizes if size is not None), default=float("inf"))


def stale(row: Row, code: str | None) -> str | None:
    """Why a row says nothing about the kernel whose hash is `code`; None where it does."""
    if row.hash != code:
        return "the kernel's source has changed since"
    now = launch_settings(row.op, row.backend, row.arch, row.dtype)
    changed = [
        kernel for kernel in {**now, **row.launch} if now.get(kernel) != row.launch.get(kernel)
    ]
    return f"the launch table's row of {', '.join(changed)} has changed since" if changed else None


def launch_settings(
    op: str, backend: str, arch: int, dtype: str, table: Table | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the rows of today's launch table, or of another, that a Triton op runs with.

    Of the extension's there are none.
    """
    if backend != "triton":
        return {}
    table = rows_of_table() if table is None else table
    kind = "fp32" if dtype in ("float32", "mixed", "tf32") else "half"
    found = {}
    for kernel in TRITON[op][1]:
        own = {a: row for name, a, key, row in table if (name, key) == (kernel, kind)}
        if own:
            found[kernel] = tuple(own[max([a for a in own if a <= arch] or [min(own)])])
    return found


@functools.cache
def kernel_hash(op: str, backend: str) -> str | None:
    """sha256 of the source that an op's kernels are made of, as it is now.

    Of Triton's the op's file, what it imports of *_triton.py and the launch table's constants; of
    the extension's what setup.py took when it was built. None where there is none to be had.
    """
    if backend == "cuda":
        return getattr(build.load_extension(), "cuda_sources", None) or None
    try:
        files = triton_sources(FILE.parent, f"{TRITON[op][0]}_triton.py")
    except OSError:  # installed without sources
        return None
    return digest(files | {"launch_table": f"{PRECISION} {TARGET_PROGRAMS}".encode()})


def kernel_hashes(extension: object | None = None) -> dict[str, str]:
    """Return what identifies today's kernels, for a run on a GPU to keep beside its results.

    "op/backend": `kernel_hash`, of the extension's that of the module given, nothing without one;
    "launch/kernel/arch/kind": the row of the launch table.
    """
    hashes = {f"{op}/triton": kernel_hash(op, "triton") for op in TRITON}
    hashes |= {f"{op}/cuda": getattr(extension, "cuda_sources", None) for op in CUDA}
    found = {key: value for key, value in hashes.items() if value}
    for kernel, arch, kind, row in rows_of_table():
        found[f"launch/{kernel}/{arch}/{kind}"] = ",".join(map(str, row))
    return found


def triton_sources(folder: Path, name: str) -> dict[str, bytes]:
    """Return a kernel's file in `folder` and every other *_triton.py it comes to import."""
    found: dict[str, bytes] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = (folder / name).read_bytes()
        for node in ast.walk(ast.parse(found[name])):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module is not None and module.endswith("_triton"):
                waiting.append(f"{module.rpartition('.')[2]}.py")
    return found


def digest(files: Mapping[str, bytes]) -> str:
    """sha256 of files, in the order of their names; setup.py makes the extension's alike."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name} {len(files[name])}\n".encode() + files[name])
    return total.hexdigest()


def verdict(op: str, backend: str, proven: Sequence[Row]) -> tuple[str, str]:
    """(where a kernel ran, what "auto" takes on a GPU), each in a few words, of valid rows."""
    own = [row for row in proven if (row.op, row.backend) == (op, backend)]
    faster = [row for row in own if row.faster_from is not None]
    ran = "; ".join(sorted({f"{row.device} (sm_{row.arch})" for row in own}))
    if not own:
        return "no GPU", "PyTorch"
    if not faster:
        return ran, "PyTorch, which was faster"
    return ran, "the kernel: " + "; ".join(sorted(map(_when, faster)))


def _when(row: Row) -> str:
    widths = f"{row.widths[0]} to {row.widths[1]}"
    multiples = "" if row.multiple_of == 1 else f", multiples of {row.multiple_of}"
    measure = {SEGMENTS: "R·N·T·O·I", LOOKUPS: "R·N·T·D"}.get(row.op, "N·V")
    width = "min(O, I)" if row.op == SEGMENTS else "D"
    size = f"{measure} ≥ {row.faster_from:,}"
    return f"sm_{row.arch} {row.dtype}, {width} {widths}{multiples}, {size}"


def kernel_status() -> str:
    """For a person: what backend "auto" does on a GPU with each op that has kernels, and why."""
    lines = []
    for op, backend in KERNELS:
        code = kernel_hash(op, backend)
        own = [row for row in rows() if (row.op, row.backend) == (op, backend)]
        ran, taken = verdict(op, backend, [row for row in own if stale(row, code) is None])
        reasons = sorted({reason for row in own if (reason := stale(row, code)) is not None})
        lines.append(f"{op} ({backend}): ran on {ran}; auto takes {taken}")
        lines += [f"  a row of {own[0].evidence} does not count: {reason}" for reason in reasons]
    return "\n".join(lines)
