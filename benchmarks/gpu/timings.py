"""Units `time:OP:DTYPE:D` and `ceiling:WHAT`: coarse times and what the machine can do at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import percentiles
from benchmarks.gpu.cases import KINDS, Case, draw, outputs
from benchmarks.gpu.day import Day, lines
from benchmarks.gpu.segment_checks import lookups, random
from fisherkern import ops
from fisherkern.ops.backend import use_backend

SHAPES = ((256, 3706), (4096, 1_000_000))
# Per row of these an op's work grows with D², or with the ranges drawn from.
FEWER_ROWS = {"softmax_covariance": 256}
DRY_SHAPES = ((8, 96),)
REPEATS, SECONDS = 10, 0.5
# Of segment_outer_square_: R, N, T, O, I.
SEGMENT, DRY_SEGMENT = (64, 10, 200, 256, 64), (2, 3, 5, 16, 8)
# Of lookup_square_: R, N, T, V, D.
LOOKUP, DRY_LOOKUP = (64, 64, 200, 3706, 64), (2, 3, 5, 11, 8)


def stopwatch(
    function: Callable[[], Any], device: str, repeats: int = REPEATS, seconds: float = SECONDS
) -> dict[str, float]:
    """p20_ms, p50_ms and p80_ms of a warmed-up function, between CUDA's events on a GPU.

    At most `repeats` calls, fewer where they take longer than `seconds`, but three.
    """
    if device == "cuda":
        function()  # warm
    repeats = repeats if device == "cuda" else 1
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() - begun < seconds):
        times.append(_once(function, device))
    return percentiles(times)


def _once(function: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        started = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - started)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(100_000)  # so that launches are queued before the clock starts
    first.record()
    function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def failed(day: Day) -> set[tuple[str, str, str]]:
    """(op, backend, dtype) of which a check was not right: not timed."""
    found = [line for line in lines(day.out / "check.jsonl") if not line.get("ok")]
    return {(line.get("op"), line.get("backend"), line.get("dtype")) for line in found}


def measure(day: Day, unit: str, op: str, dtype: str, width: str) -> None:
    """Every backend that was right beside the bare product, each shape in turn."""
    d, wrong = int(width), failed(day)
    for about, calls, small in _subjects(day, op, dtype, d):
        for backend, call in calls.items():
            if (op, backend, dtype) in wrong:
                continue
            line = {"unit": unit, "op": op, "backend": backend, "dtype": dtype, **about}
            name = backend if backend in ("triton", "cuda", "torch") else "auto"
            try:
                with use_backend(name):
                    if backend == "triton":
                        small()  # compiles, while another unit has the GPU to itself
                    with day.alone():
                        found = stopwatch(call, day.device)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"[:300]
                day.emit("other", **line, what="time", ok=False, exception=text)
                if "CUDA error" in text:
                    raise
            else:
                day.emit("time", **line, **found, ok=True)


Subject = tuple[dict[str, int], dict[str, Callable[[], Any]], Callable[[], Any]]


def _subjects(day: Day, op: str, dtype: str, d: int) -> list[Subject]:
    """(sizes, calls by backend, the same call at a size that only compiles) of an op."""
    if op == "segment_outer_square_":
        return [_segment(day, dtype)]
    if op == "lookup_square_":
        return [_lookup(day, dtype)]
    subjects: list[Subject] = []
    for n, v in DRY_SHAPES if day.dry else SHAPES:
        n = min(n, FEWER_ROWS.get(op, n))
        with day.alone():
            case = draw(dtype, n, v, d, day.device)
            _ = case.lse, case.mean
            _ = case.ranges if op.startswith("sample") else None
        # Divisible by 16 as the sizes timed are, so that the same kernel is compiled.
        tiny = draw(dtype, 16 if n % 16 == 0 else 17, 512 + v % 16, d, day.device)
        calls = {
            "triton": lambda case=case: outputs(op, case),
            "torch": lambda case=case: outputs(op, case),
            "product": lambda case=case: product(case),
        }
        small = {"D": d, "N": n, "V": v}
        subjects.append((small, calls, lambda tiny=tiny: outputs(op, tiny)))
    return subjects


def product(case: Case, tile: int = 16_384) -> None:
    """h Wᵀ alone, a tile of items after the other."""
    h = case.h.to(case.weight.dtype)
    for start in range(0, len(case.weight), tile):
        h @ case.weight[start : start + tile].T


def _segment(day: Day, dtype: str) -> Subject:
    r, n, t, o, i = DRY_SEGMENT if day.dry else SEGMENT
    delta = random(r, n, t, o, seed=0, device=day.device, dtype=KINDS[dtype][0])
    inputs = random(n, t, i, seed=1, device=day.device, dtype=KINDS[dtype][0])
    fisher = torch.zeros(o, i, device=day.device)

    def call() -> None:
        ops.segment_outer_square_(fisher, delta, inputs)

    def bmm() -> Tensor:
        return torch.matmul(delta.transpose(2, 3), inputs)

    calls = {"cuda": call, "triton": call, "torch": call, "product": bmm}
    return {"D": i, "N": r * n, "V": o, "size": r * n * t * o * i}, calls, call


def _lookup(day: Day, dtype: str) -> Subject:
    sizes = DRY_LOOKUP if day.dry else LOOKUP
    given, delta, beta, hidden = lookups(sizes, KINDS[dtype][0], day.device)
    fisher = torch.zeros(sizes[3], sizes[4], device=day.device)

    def call() -> None:
        ops.lookup_square_(fisher, delta, given, beta, hidden)

    r, n, t, v, d = sizes
    about = {"D": d, "N": r * n, "V": v, "size": r * n * t * d}
    return about, {"cuda": call, "torch": call}, call


def ceiling(day: Day, unit: str, what: str) -> None:
    """One line: the rate, in GB/s, TFLOP/s, exponentials or calls a second."""
    with day.alone():
        rate, rest = CEILINGS[what](day)
    day.emit("other", unit=unit, ok=True, what=what, rate=rate, **rest)


Rate = tuple[float, dict[str, Any]]


def _copy(day: Day) -> Rate:
    source = torch.empty(2**18 if day.dry else 2**28, device=day.device)
    target = torch.empty_like(source)
    found = stopwatch(lambda: target.copy_(source), day.device)
    return 8 * source.numel() / found["p50_ms"] / 1e6, found


def _products(dtype: torch.dtype, precision: str) -> Callable[[Day], Rate]:
    def run(day: Day) -> Rate:
        size = 128 if day.dry else 8192
        a = torch.randn(size, size, device=day.device).to(dtype)
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            found = stopwatch(lambda: a @ a, day.device)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        return 2 * size**3 / found["p50_ms"] / 1e9, found

    return run


def _exp2(day: Day) -> Rate:
    from benchmarks.gpu.exp2_triton import LOOPS, exp2_kernel

    size = 1024 if day.dry else 2**24
    x = torch.rand(size, device=day.device)
    grid = (size // 1024,)
    found = stopwatch(lambda: exp2_kernel[grid](x, LOOPS=LOOPS, SIZE=1024), day.device)
    return size * LOOPS / found["p50_ms"] / 1e6, found


def _factor(name: str) -> Callable[[Day], Rate]:
    def run(day: Day) -> Rate:
        n = 4 if day.dry else 256
        a = torch.randn(n, 64, 96, device=day.device, dtype=torch.float64)
        c = a @ a.mT
        found = stopwatch(lambda: getattr(torch.linalg, name)(c), day.device)
        return 1e3 * n / found["p50_ms"], found

    return run


def _launches(day: Day) -> Rate:
    """Small calls a second, not waited for: what Python and a launch cost."""
    case = draw("float32", 16, 512, 64, day.device)
    with use_backend("triton"):
        outputs("softmax_lse", case)
        begun, count = time.perf_counter(), 5 if day.dry else 200
        for _ in range(count):
            outputs("softmax_lse", case)
        rate = count / (time.perf_counter() - begun)
    return rate, {}


CEILINGS: dict[str, Callable[[Day], Rate]] = {
    "copy": _copy,
    "bf16": _products(torch.bfloat16, "ieee"),
    "tf32": _products(torch.float32, "tf32"),
    "fp32": _products(torch.float32, "ieee"),
    "fp64": _products(torch.float64, "ieee"),
    "exp2": _exp2,
    "eigh": _factor("eigh"),
    "cholesky": _factor("cholesky"),
    "launches": _launches,
}
