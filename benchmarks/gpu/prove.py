"""Write proven.json from a run on a GPU: python -m benchmarks.gpu.prove benchmarks/results/gpu_DATE

A kernel gets a row for an architecture, a dtype and a class of widths where every check of the
run was right, none is missing, no sanitizer found anything, and its source is today's. From which
size the kernel beats PyTorch is read off the run's times. Each kernel without a row is printed with
the reason. Rows that the run does not confirm and rows of changed kernels are taken out; without a
folder nothing else happens. Run benchmarks/readme_tables.py afterwards.

The folder, or folders of the parts in it, hold what benchmarks/gpu_day.py wrote: check.jsonl,
time.jsonl and sweep.jsonl, a line for each check, time and launch setting; units.jsonl, how
processes ended; other.jsonl, or env.json, with "hashes": `fisherkern.ops.proven.kernel_hashes` as
they were there. Times of segments and lookups say their "size", in the letters of proven.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fisherkern.errors import InputError
from fisherkern.files import atomic_path
from fisherkern.ops import proven
from fisherkern.ops.proven import KERNELS, LOOKUPS, SEGMENTS, TRITON, Row

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "setup.py"
Line = dict[str, Any]

# Sizes of catalogues that every op of the output layer must have been right with.
ITEMS = ((1, 64), (257, 2000), (2001, 10_000), (100_000, 999_999))
# Ops with sums so long that digits are lost nowhere else, and the width they are checked at.
LONG_OPS, LONG_WIDTH, LONG_ITEMS = ("softmax_lse", "softmax_mean", "head_sqgrad_"), 64, 10**6
# Parts of the names that must be among a kernel's checks, those of the output layer have more.
SPECIAL, SPECIAL_OF_ITEMS = ("second stream",), ("same bits", "bias none", "bias impossible")
# What kernels take; elsewhere backend "cuda" is another one.
DTYPES = {
    (SEGMENTS, "cuda"): ("float32", "tf32", "bfloat16"),
    (LOOKUPS, "cuda"): ("float32", "bfloat16"),
}
TRITON_DTYPES = ("float32", "bfloat16", "float16", "mixed")


class Cell(NamedTuple):
    """What a row is about."""

    op: str
    backend: str
    dtype: str
    widths: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.op} {self.backend} {self.dtype}, {self.widths[0]} to {self.widths[1]}"


class Run(NamedTuple):
    """The lines of a run, its GPU, and the hashes recorded: several where the code was changed.

    Among the checks are the ends of their processes.
    """

    folder: Path
    checks: list[Line]
    times: list[Line]
    sweep: list[Line]
    others: list[Line]
    hashes: list[dict[str, str]]
    arch: int
    device: str


def read_run(folder: Path) -> Run:
    """Raises InputError where a line is of no GPU, or nothing says of which code they are."""
    names = ("check", "units", "time", "sweep", "other")
    found: dict[str, list[Line]] = {name: [] for name in names}
    for part in sorted({path.parent for path in folder.rglob("*.jsonl")}):
        for name in names:
            # In the order that they came in, as a later part runs some units again.
            found["check" if name == "units" else name] += read_lines(part / f"{name}.jsonl")
    records = [line for line in found["other"] if "hashes" in line]
    records += [json.loads(path.read_text("utf-8")) for path in sorted(folder.rglob("env.json"))]
    hashes = [record["hashes"] for record in records if "hashes" in record]
    if not hashes:
        raise InputError(f"{folder}: nothing says of which kernels its lines are: no hashes")
    lines = [line for own in found.values() for line in own]
    gpus = {(line["arch"], line["device"]) for line in lines if "arch" in line}
    if len(gpus) != 1:
        raise InputError(f"{folder}: its lines are not of one GPU: {sorted(gpus)}")
    checks = [line for line in found["check"] if is_check(line)]
    sweep = [line for line in found["sweep"] if "kernel" in line]  # a torn line has none
    return Run(folder, checks, found["time"], sweep, found["other"], hashes, *gpus.pop())


def is_check(line: Line) -> bool:
    """Whether a line tells of a check: not of a sweep that ended, nor of what never began."""
    others = ("env", "build", "sanitizer", "ncu", "sass", "figure", "time", "ceiling", "sweep",
              "launch", "small", "engine")  # fmt: skip
    return line["ok"] is not None and line.get("unit", "").split(":")[0] not in others


def read_lines(path: Path) -> list[Line]:
    """JSON lines; one that a killed process left torn is a failure of its unit."""
    found = []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for number, part in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(part)
        except json.JSONDecodeError:
            unit = re.search(r'"unit": "([^"]*)"', part)
            line = {"unit": unit[1] if unit else "", "ok": False, "exception": "a torn line"}
        if line.get("device") in ("interpreter", "cpu") or line.get("arch", 90) < 80:
            raise InputError(f"{path}: line {number} is of the {line.get('device')}, not of a GPU")
        found.append(line)
    return found


def settled(lines: Sequence[Line]) -> list[Line]:
    """All but exceptions of what ran again; what was wrong once stays wrong.

    An exception with a shape is made good by a later line of its unit, backend and shape, one of
    a whole process by any later line of its unit.
    """
    found = []
    for index, line in enumerate(lines):
        if line["ok"] or line.get("of_allowed") is not None or not line.get("unit"):
            found.append(line)
            continue
        keys = ("unit", "backend", "D", "N", "V") if line.get("N") else ("unit",)
        later = [x for x in lines[index + 1 :] if all(x.get(k) == line.get(k) for k in keys)]
        if not any(other["ok"] for other in later):
            found.append(line)
    return found


def named(line: Line) -> Line:
    """The line with what its unit's name says and the line of a dead process does not.

    Units are check:OP:DTYPE:D, of segments segments:..., of the extension extension:OP:PRECISION.
    """
    kind, *parts = str(line.get("unit", "")).split(":")
    said: Line = dict(zip(("op", "dtype", "D"), parts, strict=False))
    if str(said.get("D", "")).isdecimal():
        said["D"] = int(said["D"])
    if kind == "extension":
        said["backend"] = "cuda"
    return said | {key: value for key, value in line.items() if value is not None}


def cells_of(line: Line) -> list[Cell]:
    """What a line of checks or times bears on; nothing where it is of no kernel."""
    line = named(line)
    found = []
    for op, backend in KERNELS:
        same = op == line.get("op") and line.get("backend", backend) == backend
        if not same or line.get("dtype") not in DTYPES.get((op, backend), TRITON_DTYPES):
            continue
        tile = re.match(r"tile (64|128)", line.get("what", ""))
        width = width_of(line)
        if op == SEGMENTS and backend == "cuda" and tile:
            width = int(tile[1])  # asked for by itself, whatever F's size
        elif op == SEGMENTS and line.get("ok") is False:
            width = None  # which of its kernels, nobody knows
        for widths in proven.widths_of(op, backend):
            if width is None or widths[0] <= width <= widths[1]:
                found.append(Cell(op, backend, line["dtype"], widths))
    return found


def width_of(line: Line) -> int | None:
    """D; of segments min(O, I), where V is O and D is I."""
    if line["op"] == SEGMENTS and "V" in line:
        return min(line["D"], line["V"])
    return line.get("D")


def suspected(run: Run, despite: Sequence[str]) -> dict[str, list[str]]:
    """Backend -> failures of units that are about all its kernels: sanitizers, diag_fisher."""
    found: dict[str, list[str]] = {"triton": [], "cuda": []}
    tools = [x for x in run.others if x.get("unit", "").split(":")[0] in ("sanitizer", "driver")]
    for line in [*settled(run.checks), *settled(tools)]:
        unit = line.get("unit", "")
        if line["ok"] or named(line).get("op") in (*TRITON, LOOKUPS) or unit in despite:
            continue
        words = {line.get("backend"), *unit.split(":")} - {None}
        backends = {"cuda": {"cuda", "extension", "driver"}, "triton": {"triton"}}
        blamed = [backend for backend, names in backends.items() if names & words]
        for backend in blamed or ([] if "torch" in words else found):
            found[backend].append(f"{unit or 'a unit without a name'} failed")
    return found


def against(cell: Cell, run: Run, lines: Sequence[Line]) -> list[str]:
    """Why the checks of a cell are no proof of it; nothing where they are."""
    wrong = [line for line in lines if not line["ok"]]
    if wrong:
        return [failure(line) for line in wrong[:3]]
    sizes = {(line["D"], line["V"]) for line in lines}
    found = []
    if cell.op == SEGMENTS:
        if len({d % 16 == 0 == v % 16 for d, v in sizes}) < 2:
            found.append("not checked with both aligned and odd rows")
    elif cell.widths[1] not in {d for d, _ in sizes}:
        found.append(f"not checked at D = {cell.widths[1]}")
    special = SPECIAL
    if cell.op in TRITON and cell.op != SEGMENTS:
        special += SPECIAL_OF_ITEMS
        for width in sorted({d for d, _ in sizes}):
            for least, most in ITEMS:
                if not any(d == width and least <= v <= most for d, v in sizes):
                    found.append(f"not checked at D = {width} with {least:,} to {most:,} items")
        long = any(d == LONG_WIDTH and v >= LONG_ITEMS for d, v in sizes)
        if cell.op in LONG_OPS and cell.widths[0] <= LONG_WIDTH <= cell.widths[1] and not long:
            found.append(f"not checked at D = {LONG_WIDTH} with {LONG_ITEMS:,} items")
    names = "\n".join(str(line.get("what")) for line in lines)
    return found + [f"no check is named {name!r}" for name in special if name not in names]


def failure(line: Line) -> str:
    shape = ", ".join(f"{key} {line[key]}" for key in ("N", "V", "D") if line.get(key))
    said = line.get("exception") or line.get("reason")
    said = said or f"{line.get('of_allowed')} of the error allowed"
    return f"{line.get('what', line.get('unit'))} at {shape}: {said}"


def changed(cell: Cell, run: Run, today: Mapping[str, str]) -> str | None:
    """Why the run is not about today's kernel; None where it is.

    Launch settings may be others than the checks', where the sweep saw them right.
    """
    key = f"{cell.op}/{cell.backend}"
    if {hashes[key] for hashes in run.hashes if key in hashes} != {today[key]}:
        return "the run was of another source than the kernel has today"
    now = proven.launch_settings(cell.op, cell.backend, run.arch, cell.dtype)
    for hashes in run.hashes:
        before = proven.launch_settings(
            cell.op, cell.backend, run.arch, cell.dtype, recorded_table(hashes)
        )
        for kernel, setting in now.items():
            if before.get(kernel) != setting and not swept(cell, run, kernel, setting):
                return f"the launch table's row of {kernel} is neither the checks' nor the sweep's"
    return None


def recorded_table(hashes: Mapping[str, str]) -> proven.Table:
    keys = [key.split("/")[1:] for key in hashes if key.startswith("launch/")]
    rows = [tuple(map(int, hashes["launch/" + "/".join(key)].split(","))) for key in keys]
    return [(key[0], int(key[1]), key[2], row) for key, row in zip(keys, rows, strict=True)]


def swept(cell: Cell, run: Run, kernel: str, setting: Sequence[int]) -> bool:
    """Whether the sweep had that setting at a width of the class, and it was right each time."""
    kind = "fp32" if cell.dtype in ("float32", "mixed") else "half"
    fields = ("rows", "items", "width", "warps", "stages")
    own = [
        bool(line["correct"])
        for line in run.sweep
        if (line["kernel"], line["kind"]) == (kernel, kind)
        and [line[field] for field in fields] == list(setting)
        and cell.widths[0] <= line["D"] <= cell.widths[1]
    ]
    return bool(own) and all(own)


def faster_from(cell: Cell, times: Sequence[Line]) -> int | None:
    """The least size timed from which on the kernel's median is below PyTorch's."""
    ours = [line for line in times if "p50_ms" in line and cell in cells_of(line)]
    keys = ("op", "dtype", "D", "N", "V")
    theirs = {
        tuple(line.get(key) for key in keys): line["p50_ms"]
        for line in times
        if line.get("backend") == "torch" and "p50_ms" in line
    }
    found: dict[int, bool] = {}
    for line in ours:
        beside = theirs.get(tuple(line.get(key) for key in keys))
        size = line.get("size")
        if size is None and cell.op not in (SEGMENTS, LOOKUPS):
            size = line["N"] * line["V"]
        if beside is not None and size is not None:
            found[size] = found.get(size, True) and line["p50_ms"] < beside
    least = None
    for size in sorted(found, reverse=True):
        if not found[size]:
            break
        least = size
    return least


def hashes_of_tree() -> dict[str, str]:
    """`proven.kernel_hashes`, of the extension's sources in place of what is built here."""
    spec = importlib.util.spec_from_file_location("fisherkern_setup", SETUP)
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    cuda = {f"{op}/{backend}": setup.cuda_hash() for op, backend in KERNELS if backend == "cuda"}
    return proven.kernel_hashes() | cuda


def prove(run: Run, today: Mapping[str, str], despite: Sequence[str] = ()) -> tuple[
    list[Row], dict[Cell, list[str]]
]:  # fmt: skip
    """The rows that a run is proof of, and why each other cell that it has lines of is without."""
    try:
        evidence = run.folder.resolve().relative_to(ROOT).as_posix()
    except ValueError:
        raise InputError(f"{run.folder}: evidence belongs into benchmarks/results") from None
    lines: dict[Cell, list[Line]] = {}
    for line in settled(run.checks):
        if not line["ok"] or "of_allowed" in line:  # that a process ended well proves nothing
            for cell in cells_of(line):
                lines.setdefault(cell, []).append(line)
    blamed = suspected(run, despite)
    rows, without = [], {}
    for cell, own in lines.items():
        reasons = blamed[cell.backend] + against(cell, run, own)
        other = changed(cell, run, today)
        if reasons or other:
            without[cell] = [other] if other else reasons
            continue
        odd = cell.op == SEGMENTS or any(line["D"] % 16 for line in own)
        rows.append(
            Row(
                op=cell.op,
                backend=cell.backend,
                arch=run.arch,
                dtype=cell.dtype,
                widths=cell.widths,
                multiple_of=1 if odd else 16,
                hash=today[f"{cell.op}/{cell.backend}"],
                launch=proven.launch_settings(cell.op, cell.backend, run.arch, cell.dtype),
                faster_from=faster_from(cell, run.times),
                device=run.device,
                evidence=evidence,
            )
        )
    return rows, without


def main(arguments: list[str] | None = None, file: Path = proven.FILE) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="the results of a run")
    parser.add_argument(
        "--despite", nargs="+", default=[], metavar="UNIT",
        help="units about many kernels that failed for reasons outside of them",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    today = hashes_of_tree()
    kept = []
    for row in proven.read_proven(file):
        reason = proven.stale(row, today[f"{row.op}/{row.backend}"])
        if reason is None:
            kept.append(row)
        else:
            print(f"out     {cell_of(row)}: {reason}")
    if options.folder is not None:
        run = read_run(options.folder)
        rows, without = prove(run, today, options.despite)
        seen = {*map(cell_of, rows), *without}
        kept = [row for row in kept if row.arch != run.arch or cell_of(row) not in seen] + rows
        for row in rows:
            size = "never faster" if row.faster_from is None else f"from {row.faster_from:,}"
            print(f"proven  {cell_of(row)}: {size}")
        for cell, reasons in without.items():
            print(f"not     {cell}: {'; '.join(reasons)}")
    with atomic_path(file) as path:
        path.write_text(proven.text_of(kept), encoding="utf-8")


def cell_of(row: Row) -> Cell:
    return Cell(row.op, row.backend, row.dtype, row.widths)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"prove: {error}")
