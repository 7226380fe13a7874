"""Units `sweep:KERNEL:KIND:D`: every candidate setting of a kernel, checked and timed alone.

Candidates come from `gpu_day.py --prepare`: settings that compile for the chip without stack
and within its shared memory. The op around the kernel runs as it is; events stand on both sides
of the kernel's own launches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.common import percentiles
from benchmarks.gpu.cases import Case, draw, of_allowed, outputs, wanted
from benchmarks.gpu.day import Day, lines
from benchmarks.gpu.segment_checks import random
from benchmarks.gpu.twins import segments
from fisherkern import ops
from fisherkern.ops import launch_table
from fisherkern.ops.backend import use_backend
from fisherkern.ops.launch_table import Launch

# Kernel -> (its module, the op around it, N and V timed).
SUBJECTS: dict[str, tuple[str, str, int, int]] = {
    "softmax_lse": ("softmax_lse", "softmax_lse", 4096, 1_000_000),
    "softmax_topk": ("softmax_topk", "softmax_topk", 4096, 1_000_000),
    "softmax_mean": ("softmax_moments", "softmax_mean", 4096, 1_000_000),
    "head_sqgrad_": ("head_sqgrad", "head_sqgrad_", 4096, 1_000_000),
    "head_sqgrad_sparse": ("head_sqgrad", "head_sqgrad_", 4096, 100_000),
    "softmax_covariance": ("softmax_moments", "softmax_covariance", 256, 100_000),
    "softmax_sketch": ("softmax_sketch", "softmax_sketch", 1024, 1_000_000),
    "sample_items": ("sample_items", "sample_items", 4096, 100_000),
    "sample_items_total": ("sample_items", "sample_items", 4096, 100_000),
    "sample_distinct": ("sample_distinct", "sample_distinct", 1024, 100_000),
    "segment_outer_square_": ("segment_outer_square", "segment_outer_square_", 640, 0),
}
DTYPES = {"fp32": "float32", "half": "bfloat16"}
DRY_N, DRY_V = 8, 96
REPEATS, SECONDS = 8, 0.15
# R, N and T of segment_outer_square_, whose F is (4 D, D).
SEGMENTS, DRY_SEGMENTS = (64, 10, 200), (2, 3, 5)
# Of results that have a row for each sequence.
CHECKED_ROWS = 64


def candidates(day: Day, kernel: str, kind: str, width: int) -> list[dict[str, Any]]:
    """The settings that travel along, else the launch table's own row."""
    path = day.carried / "candidates.json"
    found = json.loads(path.read_text()) if path.exists() else []
    own = [row for row in found if (row["kernel"], row["kind"], row["D"]) == (kernel, kind, width)]
    if not own:
        rows = launch_table.rows_of_table()
        own = [row[-1]._asdict() for row in rows if row[0] == kernel and kind in row[:-1]][:1]
    return own[:1] if day.dry else own


@contextlib.contextmanager
def setting(kernel: str, kind: str, row: Launch) -> Iterator[None]:
    """Every row of the launch table for that kernel and kind is `row`, whatever else keys it."""
    table: dict[Any, Launch] = launch_table._TABLE  # type: ignore[assignment]
    before = dict(table)
    for key in before:
        if key[0] == kernel and kind in key:
            table[key] = row
    try:
        yield
    finally:
        table.update(before)


def kernel_of(name: str) -> Any:
    module = importlib.import_module(f"fisherkern.ops.{SUBJECTS[name][0]}_triton")
    return getattr(module, f"{name.rstrip('_')}_kernel")


def kernel_ms(kernel: Any, call: Callable[[], Any], device: str) -> dict[str, float]:
    """p20_ms, p50_ms, p80_ms of the kernel's launches inside a call, added up."""
    spans: list[Any] = []
    launch = kernel.run

    def watched(*arguments: Any, **options: Any) -> Any:
        if device == "cpu":
            started = time.perf_counter()
            found = launch(*arguments, **options)
            spans.append(1e3 * (time.perf_counter() - started))
            return found
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        found = launch(*arguments, **options)
        last.record()
        spans.append((first, last))
        return found

    times: list[float] = []
    begun = time.perf_counter()
    kernel.run = watched
    try:
        most = REPEATS if device == "cuda" else 1
        while len(times) < most and (len(times) < 3 or time.perf_counter() - begun < SECONDS):
            spans.clear()
            if device == "cuda":
                torch.cuda._sleep(200_000)  # the launches are queued before the first event
            call()
            if device == "cuda":
                torch.cuda.synchronize()
                times.append(sum(first.elapsed_time(last) for first, last in spans))
            else:
                times.append(sum(spans))
    finally:
        kernel.run = launch
    return percentiles(times)


def sweep(day: Day, unit: str, kernel: str, kind: str, width: str) -> None:
    """A line for each candidate; one that does not compile or is wrong is a line as well."""
    d = int(width)
    rows = candidates(day, kernel, kind, d)
    for row in rows:  # compiled first, beside other units
        with contextlib.suppress(Exception), chosen(kernel, kind, row), use_backend("triton"):
            call_of(day, kernel, kind, d, tiny=True)[0]()
    with day.alone():
        call, right, sizes = call_of(day, kernel, kind, d, tiny=False)
        for row in rows:
            line = {"unit": unit, "kernel": kernel, "kind": kind, "D": d, **sizes}
            line |= {key: row.get(key) for key in (*Launch._fields, *RESOURCES)}
            try:
                with chosen(kernel, kind, row), use_backend("triton"):
                    correct = right()
                    found = kernel_ms(kernel_of(kernel), call, day.device)
                day.emit("sweep", **line, **found, correct=correct, ok=True)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"[:300]
                day.emit("sweep", **line, correct=False, ok=True, exception=text)
                if "CUDA error" in text:
                    raise


RESOURCES = ("registers", "shared", "stack")
# Ops beside the one around the kernel that a setting must be right for.
ALSO = {"softmax_lse": ("softmax_mean",)}


def chosen(kernel: str, kind: str, row: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    return setting(kernel, kind, Launch(*(row[field] for field in Launch._fields)))


Call = tuple[Callable[[], Any], Callable[[], bool], dict[str, int]]


def call_of(day: Day, kernel: str, kind: str, d: int, *, tiny: bool) -> Call:
    """(the op around the kernel, whether its numbers are right, N and V)."""
    op = SUBJECTS[kernel][1]
    if op == "segment_outer_square_":
        return _segments(day, kind, d)
    n, v = (DRY_N, DRY_V) if day.dry else SUBJECTS[kernel][2:]
    if tiny:  # divisible by 16 as the sizes timed are, so that the same kernel is compiled
        n, v = 16, 512
    checked = min(n, CHECKED_ROWS) if op != "head_sqgrad_" else None
    case = draw(DTYPES[kind], n, v, d, day.device, checked=checked)
    # The ranges of one op are another's kernel, which must not run over their ends.
    checks: dict[str, Any] = {}

    def right() -> bool:
        if not checks:
            checks.update({name: wanted(name, case) for name in (op, *ALSO.get(kernel, ()))})
        found = {name: outputs(name, case) for name in checks}
        return all(
            of_allowed(found[op][name], *own) <= 1
            for op, exact in checks.items()
            for name, own in exact.items()
            if name != "omega"
        )

    return (lambda: outputs(op, case)), right, {"N": n, "V": v}


def _segments(day: Day, kind: str, d: int) -> Call:
    """Small enough to compile with: chunks and splits follow from the sizes."""
    probes, n, t = DRY_SEGMENTS if day.dry else SEGMENTS
    dtype = getattr(torch, DTYPES[kind])
    delta = random(probes, n, t, 4 * d, seed=0, device=day.device, dtype=dtype)
    inputs = random(n, t, d, seed=1, device=day.device, dtype=dtype)
    exact = segments(delta.flatten(1, 2), inputs.flatten(0, 1), range(0, n * t + 1, t))

    def call() -> torch.Tensor:
        fisher = torch.zeros(4 * d, d, device=day.device)
        ops.segment_outer_square_(fisher, delta, inputs)
        return fisher

    return call, lambda: of_allowed(call(), exact, 1e-4) <= 1, {"N": probes * n, "V": 4 * d}


def best(day: Day, kernel: str, kind: str, width: int) -> dict[str, Any] | None:
    """The fastest right setting of this day's sweep."""
    own = [
        line
        for line in lines(day.out / "sweep.jsonl")
        if (line["kernel"], line["kind"], line["D"]) == (kernel, kind, width)
        and line["correct"]
        and "p50_ms" in line
    ]
    return min(own, key=lambda line: line["p50_ms"]) if own else None


GROUPS = {
    "stream": ("softmax_lse", "softmax_mean", "head_sqgrad_"),
    "rows": ("softmax_topk", "softmax_sketch", "softmax_covariance"),
    "draws": ("sample_items", "sample_distinct", "head_sqgrad_sparse"),
    "segments": ("segment_outer_square_",),
}


def launch(day: Day, unit: str, group: str) -> None:
    """Each kernel of a group once at its best setting, D = 64: what ncu and cuobjdump look at."""
    for kernel in GROUPS[group]:
        for kind in ("fp32", "half"):
            row = best(day, kernel, kind, 64) or candidates(day, kernel, kind, 64)[0]
            with chosen(kernel, kind, row), use_backend("triton"):
                call_of(day, kernel, kind, 64, tiny=False)[0]()
    if day.device == "cuda":
        torch.cuda.synchronize()


def small(day: Day, unit: str, which: str) -> None:
    """Every Triton kernel on small odd shapes, for the sanitizers."""
    n, v = (5, 33) if day.dry else (33, 257)
    with use_backend("triton"):
        for d in (50, 64):
            for op in dict.fromkeys(subject[1] for subject in SUBJECTS.values()):
                if op == "segment_outer_square_":
                    delta = random(2, 3, 7, d, seed=0, device=day.device)
                    inputs = random(3, 7, d, seed=1, device=day.device)
                    ops.segment_outer_square_(torch.zeros(d, d, device=day.device), delta, inputs)
                else:
                    outputs(op, copied(draw("float32", n, v, d, "cpu", bias="some"), day.device))
    if day.device == "cuda":
        torch.cuda.synchronize()


def copied(case: Case, device: str) -> Case:
    """Made on the CPU and copied whole: a copy counts as written for initcheck."""
    bias = None if case.bias is None else case.bias.to(device)
    return dataclasses.replace(case, h=case.h.to(device), weight=case.weight.to(device), bias=bias)
