"""The units of each part: their names, limits, order and what runs them."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks.gpu.day import Day, architecture, device_name, lines
from benchmarks.gpu.tools import TOOLS

# Kind -> (module, function called with the day, the unit's name and its other parts).
KINDS = {
    "env": ("benchmarks.gpu.tools", "environment"),
    "build": ("benchmarks.gpu.tools", "build"),
    "driver": ("benchmarks.gpu.tools", "driver"),
    "sanitizer": ("benchmarks.gpu.tools", "sanitize"),
    "ncu": ("benchmarks.gpu.tools", "profile"),
    "sass": ("benchmarks.gpu.tools", "disassemble"),
    "figure": ("benchmarks.gpu.tools", "figure"),
    "check": ("benchmarks.gpu.checks", "check"),
    "segments": ("benchmarks.gpu.segment_checks", "check"),
    "extension": ("benchmarks.gpu.segment_checks", "compiled"),
    "fisher": ("benchmarks.gpu.fisher_checks", "check"),
    "time": ("benchmarks.gpu.timings", "measure"),
    "ceiling": ("benchmarks.gpu.timings", "ceiling"),
    "sweep": ("benchmarks.gpu.sweep", "sweep"),
    "launch": ("benchmarks.gpu.sweep", "launch"),
    "small": ("benchmarks.gpu.sweep", "small"),
    "engine": ("benchmarks.gpu.engine_runs", "run"),
    "planted": ("benchmarks.gpu.units", "plant"),
}
OPS = (
    "softmax_lse", "head_sqgrad_", "softmax_mean", "softmax_topk", "softmax_covariance",
    "softmax_sketch", "sample_items", "sample_distinct",
)  # fmt: skip
KERNELS = (
    "softmax_lse", "head_sqgrad_", "softmax_mean", "softmax_topk", "softmax_sketch",
    "softmax_covariance", "sample_items", "sample_distinct", "head_sqgrad_sparse",
    "sample_items_total", "segment_outer_square_",
)  # fmt: skip
SEGMENTED = ("segment_outer_square_", "lookup_square_")
DTYPES = ("float32", "bfloat16", "mixed", "float16")
WIDTHS = (64, 256, 50, 128, 100)
PRECISIONS = {
    "segment_outer_square_": ("float32", "tf32", "bfloat16"),
    "lookup_square_": ("float32", "bfloat16"),
}
SAMPLERS = ("exact", "topk", "model", "sketch", "random", "target")
GROUPS = ("stream", "rows", "draws", "segments")
CEILINGS = ("copy", "bf16", "tf32", "fp32", "fp64", "exp2", "eigh", "cholesky", "launches")
POSITIONS = (2**17, 2**19, 2**20, 2**21)
FAULTS = ("wrong", "crash", "hang")
# Kinds of units that need the GPU and not all of it.
CHECKS = ("check", "segments", "extension", "fisher")


@dataclasses.dataclass(frozen=True)
class Unit:
    """A process: its name, its seconds, the unit it waits for, and the phase it belongs to.

    Phase 1 starts when phase 0 is over, by itself or by `until`, its share of the budget.
    """

    name: str
    limit: float = 60
    after: str | None = None
    phase: int = 0


# Widths and dtypes that `auto` needs times of as well: the engine's own for a bf16 model first.
MORE_TIMED = ((64, "mixed"), (128, "float32"), (128, "mixed"), (256, "float32"))

# The share of the budget at which phase 0 ends: what is timed then shares the GPU with nothing.
UNTIL = {"correct": 0.72, "tune": 1.0}


def correct() -> Iterator[Unit]:
    """Everything is checked, then what was right is timed."""
    yield Unit("env:all", 30)
    yield Unit("build:all", 120)
    for width, dtype in itertools.product(WIDTHS, DTYPES):
        for op in OPS:
            yield Unit(f"check:{op}:{dtype}:{width}", 90)
        for op in SEGMENTED:
            yield Unit(f"segments:{op}:{dtype}:{width}", 60, "build:all")
        if (width, dtype) == (WIDTHS[0], DTYPES[0]):
            yield from after_build()
    for op, width, dtype in itertools.product((*OPS, *SEGMENTED), (64,), DTYPES[:2]):
        yield Unit(f"time:{op}:{dtype}:{width}", 45, None, 1)


def after_build() -> Iterator[Unit]:
    """What wants the extension or takes long, early in the queue."""
    for op, precisions in PRECISIONS.items():
        for precision in precisions:
            yield Unit(f"extension:{op}:{precision}", 60, "build:all")
    yield Unit("driver:all", 30, "build:all")
    for tool in TOOLS:
        yield Unit(f"sanitizer:{tool}:extension", 60, "driver:all")
        yield Unit(f"sanitizer:{tool}:triton", 150, "build:all")
    for sampler, backend in itertools.product(SAMPLERS, ("torch", "triton", "cuda")):
        yield Unit(f"fisher:{sampler}:{backend}", 60, "build:all")


def tune(again: Path) -> Iterator[Unit]:
    """Ceilings, failed units again, the sweep, then what looks at its winners and the engine."""
    yield Unit("env:all", 30)
    yield Unit("build:all", 120)  # a machine that was given back starts bare
    for what in CEILINGS:
        yield Unit(f"ceiling:{what}", 30)
    for name in failed_units(again):
        if name.split(":")[0] in CHECKS:
            yield Unit(name, 60, "build:all")
    yield from sweeps(64)
    yield from engines((POSITIONS[0], POSITIONS[2]))
    for group in GROUPS:
        yield Unit(f"ncu:{group}", 90, f"sweep:{KERNELS[-1]}:half:64")
        yield Unit(f"sass:{group}", 60, f"sweep:{KERNELS[-1]}:half:64")
    for sampler, backend in itertools.product(("exact", "topk"), ("triton", "cuda")):
        yield Unit(f"engine:{sampler}:{backend}:{POSITIONS[2]}", 60, "build:all")
    yield Unit("figure:all", 60)
    for op, (width, dtype) in itertools.product((*OPS, *SEGMENTED), MORE_TIMED):
        yield Unit(f"time:{op}:{dtype}:{width}", 45, "build:all")
    yield from sweeps(256)
    yield from engines((POSITIONS[1], POSITIONS[3]))
    yield Unit("figure:two", 90)
    yield from sweeps(128)


def failed_units(folder: Path) -> list[str]:
    """Units of which a process or a line was not right, each once, in order."""
    both = [*lines(folder / "units.jsonl"), *lines(folder / "check.jsonl")]
    return list(dict.fromkeys(line["unit"] for line in both if line["ok"] is False))


def sweeps(width: int) -> Iterator[Unit]:
    for kind, kernel in itertools.product(("fp32", "half"), KERNELS):
        yield Unit(f"sweep:{kernel}:{kind}:{width}", 90)


def engines(positions: Iterable[int]) -> Iterator[Unit]:
    for count, sampler in itertools.product(positions, ("exact", "topk")):
        yield Unit(f"engine:{sampler}:torch:{count}", 60, "build:all")


def dry() -> Iterator[Unit]:
    """One unit of every kind and op, small, and the planted faults among them.

    Whoever runs it may share a core with much else: only the planted hang meets its limit.
    """
    yield Unit("planted:wrong", 60)
    yield Unit("planted:crash", 60)
    yield Unit("planted:hang", 4)
    yield from (dataclasses.replace(unit, limit=5 * unit.limit) for unit in _dry())


def _dry() -> Iterator[Unit]:
    yield Unit("env:all", 60)
    yield Unit("build:all", 240)
    for op in OPS:
        yield Unit(f"check:{op}:float32:20", 120)
    yield Unit("check:softmax_lse:mixed:64", 120)
    yield Unit("check:softmax_mean:bfloat16:50", 120)
    for op in SEGMENTED:
        yield Unit(f"segments:{op}:float32:20", 60, "build:all")
        for precision in PRECISIONS[op]:
            yield Unit(f"extension:{op}:{precision}", 120, "build:all")
    yield Unit("driver:all", 60, "build:all")
    yield Unit("small:all", 120)
    for tool in TOOLS:
        yield Unit(f"sanitizer:{tool}:triton")
        yield Unit(f"sanitizer:{tool}:extension")
    for sampler, backend in itertools.product(SAMPLERS, ("torch", "triton", "cuda")):
        yield Unit(f"fisher:{sampler}:{backend}", 90)
    for op in (*OPS, *SEGMENTED):
        yield Unit(f"time:{op}:float32:16", 60, "build:all", 1)
    for what in CEILINGS:
        yield Unit(f"ceiling:{what}", 60, None, 1)
    for kernel in KERNELS:
        yield Unit(f"sweep:{kernel}:fp32:16", 60, None, 1)
    for sampler in ("exact", "topk"):
        yield Unit(f"engine:{sampler}:torch:{POSITIONS[0]}", 60, None, 1)
    yield Unit("figure:two", 90, None, 1)
    for group in GROUPS:
        yield Unit(f"sass:{group}", 60, None, 1)
        yield Unit(f"ncu:{group}", 60, None, 1)
    yield Unit("launch:rows", 120, None, 1)


def run(day: Day, name: str) -> None:
    """Run one unit in this process."""
    kind, *parts = name.split(":")
    module, function = KINDS[kind]
    # A unit with one way to run it is called NAME:all.
    parts = [] if parts == ["all"] and kind in ("env", "build", "driver") else parts
    call: Callable[..., None] = getattr(importlib.import_module(module), function)
    if kind != "env":  # asked now: after an illegal access nothing answers
        device_name(day.dry), architecture(day.dry)
    # Beside timings nothing else runs, and in this part there are timings at any time.
    quiet = day.alone() if kind in CHECKS and day.part == "tune" else contextlib.nullcontext()
    with quiet:
        call(day, name, *parts)


def plant(day: Day, unit: str, fault: str) -> None:
    """A dry run's faults: a wrong number, a crash, a unit that never ends."""
    if fault == "wrong":
        day.emit("check", unit=unit, op="planted", backend="torch", dtype="float32", D=1, N=1,
                 V=1, what="wrong", of_allowed=2.0, ok=False, s=0.0)  # fmt: skip
    elif fault == "crash":
        faulthandler.disable()  # its report of a planted crash is only noise
        os.kill(os.getpid(), signal.SIGSEGV)
    else:
        time.sleep(3600)
