"""Units `check:OP:DTYPE:D`: every op in Triton and in PyTorch against float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.cases import (
    Case,
    Outputs,
    Wanted,
    draw,
    of_allowed,
    outputs,
    poisoned_memory,
    wanted,
)
from benchmarks.gpu.day import Day
from fisherkern.ops.backend import use_backend

SHAPES = ((3, 7), (33, 1031), (257, 3706), (64, 100_000))
LONG = (4096, 1_000_000)
LONG_OPS = ("softmax_lse", "softmax_mean", "head_sqgrad_")
LONG_WIDTH = 64
# The first to see a batch: a row of NaN is found by their results, and no other op gets it.
NAN_OPS = ("softmax_lse", "softmax_topk", "softmax_mean")
DRY_SHAPES = ((3, 7), (9, 257))
BACKENDS = ("triton", "torch")
# Where the cases beside the plain one run, and the row that is NaN in one of them.
ODD, DRY_ODD, NAN_ROW = (33, 1031), (9, 257), 1
# A check by name, and its error in units of what is allowed.
Share = tuple[str, float]


def check(day: Day, unit: str, op: str, dtype: str, width: str) -> None:
    """All shapes and backends; an exception costs one shape of one backend."""
    d = int(width)
    shapes = DRY_SHAPES if day.dry else SHAPES
    if not day.dry and op in LONG_OPS and d == LONG_WIDTH:
        shapes += (LONG,)
    for n, v in shapes:
        for backend in BACKENDS if (n, v) != LONG else BACKENDS[:1]:
            about = {"unit": unit, "op": op, "backend": backend, "dtype": dtype}
            about |= {"D": d, "N": n, "V": v}
            report(day, about, lambda b=backend, n=n, v=v: shares(day, op, dtype, d, n, v, b))


def report(day: Day, about: dict, checks: Callable[[], Iterator[Share]]) -> None:
    """A line for each check, and one for what stops them.

    After a CUDA error nothing in this process means anything, so it ends.
    """
    started = time.perf_counter()
    try:
        for what, share in checks():
            seconds = round(time.perf_counter() - started, 3)
            day.emit("check", **about, what=what, of_allowed=share, ok=share <= 1, s=seconds)
    except Exception as error:
        seconds = round(time.perf_counter() - started, 3)
        text = f"{type(error).__name__}: {error}"[:500]
        day.emit("check", **about, what="exception", of_allowed=None, ok=False, s=seconds,
                 exception=text)  # fmt: skip
        if "CUDA error" in text or "CUDA driver" in text:
            raise


def shares(day: Day, op: str, dtype: str, d: int, n: int, v: int, backend: str) -> Iterator[Share]:
    """The checks of one shape in one backend."""
    case = draw(dtype, n, v, d, day.device, checked=64 if (n, v) == LONG else None)
    exact = wanted(op, case)
    with use_backend(backend):
        with poisoned_memory():
            found = outputs(op, case)
        yield from compared(found, exact)
        yield "the same bits again", repeated(found, outputs(op, case))
        if day.device == "cuda":
            other = on_another_stream(lambda: outputs(op, case))
            yield from (("second stream: " + what, share) for what, share in compared(other, exact))
        if (n, v) == (DRY_ODD if day.dry else ODD):
            for bias in ("none", "impossible"):
                special = draw(dtype, n, v, d, day.device, bias=bias)
                checks = compared(outputs(op, special), wanted(op, special))
                yield from ((f"bias {bias}: {what}", share) for what, share in checks)
            if op in NAN_OPS:
                yield from with_nan(op, draw(dtype, n, v, d, day.device), exact)


def compared(found: Outputs, exact: Wanted) -> Iterator[Share]:
    """The weights of items are compared where the items are the same."""
    items = None
    if "items" in found and "omega" in found:
        items = found["items"] == exact["items"][0]
    for what, (tensor, allowed) in exact.items():
        same = items if what == "omega" else None
        yield what, of_allowed(found[what], tensor, allowed, same)


def repeated(left: Outputs, right: Outputs) -> float:
    """0 where all bits are the same, else infinitely wrong."""
    same = all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    return 0.0 if same else float("inf")


def on_another_stream(call: Callable[[], Outputs]) -> Outputs:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = call()
    torch.cuda.current_stream().wait_stream(stream)
    return found


def with_nan(op: str, case: Case, exact: Wanted) -> Iterator[Share]:
    """A row of NaN must not reach other rows, and its log-sum-exp must be NaN."""
    others = torch.arange(len(case.h), device=case.h.device) != NAN_ROW
    case.h[NAN_ROW] = torch.nan
    found = outputs(op, case)
    left = {name: tensor[others] for name, tensor in found.items()}
    rest = {name: (tensor[others], allowed) for name, (tensor, allowed) in exact.items()}
    yield from ((f"NaN row, others: {what}", share) for what, share in compared(left, rest))
    if "lse" in found:
        yield "NaN row, its lse", 0.0 if bool(found["lse"][NAN_ROW].isnan()) else float("inf")
