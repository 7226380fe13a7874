"""Segmented squares and lookups: by the ops in every backend, and every compiled kernel by itself.

Units `check:segment_outer_square_:DTYPE:D`, `check:lookup_square_:DTYPE:D`, and
`extension:OP:PRECISION` for the nine segment kernels (three precisions of the small tile with
and without aligned rows, and of the large tile) and the lookups.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import twins
from benchmarks.gpu.cases import of_allowed, poisoned_memory, walled
from benchmarks.gpu.checks import Share, on_another_stream, repeated, report
from benchmarks.gpu.day import Day
from benchmarks.gpu.tools import extension
from fisherkern import ops
from fisherkern.ops import _extension
from fisherkern.ops._extension import LaunchSplit
from fisherkern.ops.backend import use_backend

TYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "mixed": (torch.float32, torch.bfloat16),
}
# (R, N, T): one of everything; primes; more positions than any chunk; short histories.
SIZES = ((1, 1, 1), (3, 5, 7), (2, 3, 65), (64, 20, 10))
DRY_SIZES = ((1, 1, 1), (3, 5, 7))
ALLOWED = 1e-4
# Segments of no position, of one, of a chunk of 16 or 32 less and more, and of many.
LENGTHS = (0, 1, 15, 16, 17, 0, 31, 32, 33, 65, 2, 0)
# (R, O, I): rows aligned for tiles of 64 and 128, each with some more; odd ones.
ALIGNED, ODD = ((2, 64, 64), (3, 136, 264), (1, 256, 128)), ((2, 13, 17), (3, 65, 131))
SPLITS = (1, 3)
# An emulated tile takes seconds, whatever is in it.
DRY_LENGTHS, DRY_SHAPES = (0, 1, 17, 2), ((1, 16, 24), (1, 13, 17))
# (R, N, T, V, D): duplicates, no position, more columns than a CTA's threads, odd widths.
LOOKUPS = (
    (1, 1, 1, 1, 1),
    (3, 5, 7, 4, 13),
    (2, 3, 0, 4, 8),
    (3, 23, 2, 2, 132),
    (5, 33, 9, 50, 64),
)


def random(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers among NaN."""
    g = torch.Generator().manual_seed(seed)
    return walled(torch.randn(*shape, generator=g).to(device, dtype), 0)


def check(day: Day, unit: str, op: str, dtype: str, width: str) -> None:
    d = int(width)
    one = _segments if op == "segment_outer_square_" else _lookups
    backends = ("triton", "cuda", "torch") if op == "segment_outer_square_" else ("cuda", "torch")
    for r, n, t in DRY_SIZES if day.dry else SIZES:
        for backend in backends:
            about = {"unit": unit, "op": op, "backend": backend, "dtype": dtype}
            about |= {"D": d, "N": n, "V": 2 * d if op == "segment_outer_square_" else n + 1}
            run = one(day, dtype, d, r, n, t)
            report(day, about, lambda run=run, b=backend: _in_backend(day, b, run))


def _in_backend(
    day: Day, backend: str, run: Callable[[], tuple[Tensor, Tensor]]
) -> Iterator[Share]:
    with use_backend(backend):
        with poisoned_memory():
            found, exact = run()
        yield "fisher", of_allowed(found, exact, ALLOWED)
        yield "the same bits again", repeated({"fisher": found}, {"fisher": run()[0]})
        if day.device == "cuda":
            other = on_another_stream(lambda: {"fisher": run()[0]})["fisher"]
            yield "second stream: fisher", of_allowed(other, exact, ALLOWED)


def _segments(
    day: Day, dtype: str, d: int, r: int, n: int, t: int
) -> Callable[[], tuple[Tensor, Tensor]]:
    """F (2D, D): what the op adds, and the float64 sum."""
    own, other = TYPES[dtype]

    def run() -> tuple[Tensor, Tensor]:
        delta = random(r, n, t, 2 * d, seed=0, device=day.device, dtype=own)
        inputs = random(n, t, d, seed=1, device=day.device, dtype=other)
        fisher = torch.zeros(2 * d, d, device=day.device)
        ops.segment_outer_square_(fisher, delta, inputs)
        exact = twins.segments(delta.flatten(1, 2), inputs.flatten(0, 1), range(0, n * t + 1, t))
        return fisher, exact

    return run


def _lookups(
    day: Day, dtype: str, d: int, r: int, n: int, t: int
) -> Callable[[], tuple[Tensor, Tensor]]:
    """F (N + 1, D) with the cross term of a tied table."""

    def run() -> tuple[Tensor, Tensor]:
        given, delta, beta, hidden = lookups((r, n, t, n + 1, d), TYPES[dtype][0], day.device)
        fisher = torch.zeros(n + 1, d, device=day.device)
        ops.lookup_square_(fisher, delta, given, beta, hidden)
        return fisher, twins.lookups(n + 1, delta, given, beta, hidden)

    return run


def lookups(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[ops.LookupSegments, Tensor, Tensor, Tensor]:
    """(segments, delta (R, N T, D), beta (U, R), hidden (N, D)); some positions are no lookup."""
    r, n, t, v, d = sizes
    ids = torch.randint(-1, v, (n, t), generator=torch.Generator().manual_seed(0))
    given = ops.lookup_segments(ids.to(device))
    delta = random(r, n * t, d, seed=0, device=device, dtype=dtype)
    beta = random(len(given.row), r, seed=1, device=device)
    return given, delta, beta, random(n, d, seed=2, device=device)


def compiled(day: Day, unit: str, op: str, precision: str) -> None:
    """Every compiled kernel of one op and precision, asked for by its launch."""
    built = extension(day)
    run = _compiled_segments if op == "segment_outer_square_" else _compiled_lookups
    run(day, built, {"unit": unit, "op": op, "backend": "cuda", "dtype": precision})


def _compiled_segments(day: Day, built: Any, about: dict[str, Any]) -> None:
    precision = about["dtype"]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    shapes, lengths = (DRY_SHAPES, DRY_LENGTHS) if day.dry else (ALIGNED + ODD, LENGTHS)
    for (r, o, i), tile, kind in itertools.product(shapes, (64, 128), ("int32", "int64", "none")):
        if day.dry and (tile, kind) not in ((64, "int32"), (64, "none"), (128, "int64")):
            continue
        starts = [0, *itertools.accumulate(lengths)] if kind != "none" else list(range(0, 49, 12))

        def checks(o=o, i=i, r=r, tile=tile, kind=kind, starts=starts) -> Iterator[Share]:
            delta = random(r, starts[-1], o, seed=0, device=day.device, dtype=dtype)
            inputs = random(starts[-1], i, seed=1, device=day.device, dtype=dtype)
            used = [tf32(x) if precision == "tf32" else x for x in (delta, inputs)]
            exact = 1 + twins.segments(*used, starts)
            offsets: Tensor | int = 12
            if kind != "none":
                offsets = torch.tensor(starts, dtype=getattr(torch, kind), device=day.device)

            def run(splits: int) -> Tensor:
                fisher = torch.ones(o, i, device=day.device)
                with poisoned_memory():
                    _extension.segment_outer_square_(
                        built, fisher, delta, inputs, offsets,
                        tf32=precision == "tf32", split=LaunchSplit(splits, tile),
                    )  # fmt: skip
                return fisher

            yield from _both_ways(day, run, exact, f"tile {tile}, offsets {kind}, R {r}")

        report(day, about | {"D": i, "N": len(starts) - 1, "V": o}, checks)


def _compiled_lookups(day: Day, built: Any, about: dict[str, Any]) -> None:
    dtype = TYPES[about["dtype"]][0]
    for sizes, crossed in itertools.product(LOOKUPS, (False, True)):
        r, n, t, v, d = sizes

        def checks(sizes=sizes, crossed=crossed) -> Iterator[Share]:
            given, delta, beta, hidden = lookups(sizes, dtype, day.device)
            cross = (beta, hidden) if crossed else (None, None)
            exact = 1 + twins.lookups(sizes[3], delta, given, *cross)

            def run(splits: int) -> Tensor:
                fisher = torch.ones(sizes[3], sizes[4], device=day.device)
                with poisoned_memory():
                    _extension.lookup_square_(
                        built, fisher, delta, given.order, given.segment_start, given.row,
                        given.row_start, *cross, given.sequence if crossed else None,
                        split=LaunchSplit(splits),
                    )  # fmt: skip
                return fisher

            yield from _both_ways(day, run, exact, "with beta" if crossed else "without beta")

        report(day, about | {"D": d, "N": n, "V": v}, checks)


def _both_ways(day: Day, run: Callable[[int], Tensor], exact: Tensor, what: str) -> Iterator[Share]:
    for splits in SPLITS[day.dry :]:
        found = run(splits)
        yield f"{what}, splits {splits}", of_allowed(found, exact, ALLOWED)
        if not torch.equal(found, run(splits)):
            yield f"{what}, splits {splits}: the same bits again", float("inf")
    if day.device == "cuda":
        other = on_another_stream(lambda: {"fisher": run(SPLITS[-1])})["fisher"]
        yield f"{what}, second stream", of_allowed(other, exact, ALLOWED)


def tf32(x: Tensor) -> Tensor:
    """x with 10 bits of mantissa, to nearest, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
