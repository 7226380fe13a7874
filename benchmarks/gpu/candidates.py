"""Launch settings that compile for sm_90 without stack and within a block's shared memory.

Compiled here, without a GPU, a few seconds each, those nearest to the launch table first. Each
is kept at once, so that the work can stop at any time and go on later.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.gpu.day import ROOT
from fisherkern.ops import launch_table
from fisherkern.ops.launch_table import Launch

WIDTHS = (64, 128, 256)
KINDS = ("fp32", "half")
ARCHITECTURE, SHARED = 90, 227 * 1024
EACH = 12
Compile = Callable[[str, str, Launch, int], dict[str, Any]]


def settings(row: Launch) -> Iterator[Launch]:
    """The row, then its neighbours: one field halved or doubled, then two. Zeros stay zero."""
    steps = {
        "rows": (16, 256), "items": (16, 1024), "width": (16, 128), "warps": (2, 16),
        "stages": (1, 4),
    }  # fmt: skip
    near: dict[str, list[int]] = {}
    for field, (least, most) in steps.items():
        own = getattr(row, field)
        values = [own - 1, own + 1] if field == "stages" else [own // 2, own * 2]
        near[field] = [value for value in values if own and least <= value <= most]
    seen = {row}
    yield row
    for count in (1, 2):
        for fields in itertools.combinations(near, count):
            for values in itertools.product(*(near[field] for field in fields)):
                found = row._replace(**dict(zip(fields, values, strict=True)))
                if found not in seen:
                    seen.add(found)
                    yield found


def rows_by_kernel() -> dict[tuple[str, str], Launch]:
    """(kernel, kind) -> its row of the table, the first where widths have rows of their own."""
    found: dict[tuple[str, str], Launch] = {}
    for kernel, *rest, row in launch_table.rows_of_table():
        kind = next(key for key in rest if key in KINDS)
        found.setdefault((kernel, kind), row)
    return found


def compiler() -> Compile:
    sys.path.insert(0, str(ROOT / "tests"))
    import hopper_compiler

    def compiled(kernel: str, kind: str, row: Launch, width: int) -> dict[str, Any]:
        """The most that any binary with a bias takes, of those that this setting launches."""
        with mock.patch.dict(launch_table._TABLE, {(kernel, ARCHITECTURE, kind): row}):
            found = hopper_compiler.binaries(["fp32" if kind == "fp32" else "bf16"], [width])
        name = f"{kernel.rstrip('_')}_kernel"
        used = [
            hopper_compiler.resources(hopper_compiler.compiled(binary))
            for binary in found
            if binary.kernel == name and ("bias_ptr", None) not in binary.constants
        ]
        return {key: max(one[key] for one in used) for key in ("registers", "shared", "stack")}

    return compiled


def fill(path: Path, seconds: float, compiled: Compile | None = None, each: int = EACH) -> int:
    """Add settings to the file until each kernel, kind and width has `each`, or time is over.

    Returns how many it holds. A setting that does not fit is kept with "fits": false, so that
    it is not compiled again; those that fit are what a sweep takes.
    """
    # A changed kernel is compiled anew: what was tried of the old one has another name.
    tried_path = path.with_name(f"candidates.{_sources()}.jsonl")
    tried = [json.loads(line) for line in _text(tried_path).splitlines()]
    known = {_key(line): line for line in tried}
    compiled, end = compiled or compiler(), time.monotonic() + seconds
    subjects = list(itertools.product(WIDTHS, rows_by_kernel().items()))
    queues = [(width, *key, settings(row)) for width, (key, row) in subjects]
    while queues and time.monotonic() < end:
        for queue in list(queues):  # one of each in turn, so that none is left without any
            width, kernel, kind, rows = queue
            fits = sum(1 for k, line in known.items() if k[:3] == (kernel, kind, width)
                       and line["fits"])  # fmt: skip
            row = next(rows, None) if fits < each else None
            if row is None:
                queues.remove(queue)
                continue
            line = {"kernel": kernel, "kind": kind, "D": width, **row._asdict()}
            if _key(line) not in known and time.monotonic() < end:
                line |= _fits(compiled, kernel, kind, row, width)
                known[_key(line)] = line
                with tried_path.open("a") as stream:
                    stream.write(json.dumps(line) + "\n")
    found = [line for line in known.values() if line["fits"]]
    path.write_text(json.dumps(found, indent=0) + "\n")
    return len(found)


def _fits(compiled: Compile, kernel: str, kind: str, row: Launch, width: int) -> dict[str, Any]:
    try:
        found = compiled(kernel, kind, row, width)
    except Exception as error:  # a compiler may raise anything
        return {"fits": False, "why": f"{type(error).__name__}: {error}"[:200]}
    fits = found["stack"] == 0 and found["shared"] <= SHARED
    return {"fits": fits, **{key: found[key] for key in ("registers", "shared", "stack")}}


def _sources() -> str:
    """A hash of every Triton kernel's file."""
    files = sorted(Path(launch_table.__file__).parent.glob("*_triton.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _key(line: dict[str, Any]) -> tuple:
    return (line["kernel"], line["kind"], line["D"], *(line[field] for field in Launch._fields))


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
