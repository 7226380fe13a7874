"""The last act: one archive of everything that fits, and a table of at most 60 lines."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections import defaultdict
from pathlib import Path

from benchmarks.gpu.day import Day, lines
from benchmarks.gpu.schedule import unit_states

LIMIT = 16 * 2**20
MOST_LINES = 60
# Kept beside the archive's contents for its headers and its list.
SPARE = 2**18
# Not even read: nothing in it will fit.
TOO_LARGE = 2**28
CACHES = ("triton", "models", "emulated")


def archive(day: Day, table: str, limit: int = LIMIT) -> tuple[Path, list[str]]:
    """out/day.tar.gz of at most `limit` bytes, and the names of what was left out.

    The lines come first, then small files before large ones.
    """
    files = sorted(day.out.glob("*.jsonl"))
    rest = [path for path in day.work.rglob("*") if path.is_file() and not _cached(day, path)]
    files += sorted(rest, key=lambda path: path.stat().st_size)
    target, left, room = day.out / "day.tar.gz", [], limit - SPARE
    with tarfile.open(target, "w:gz", compresslevel=6) as tar:
        _add(tar, "summary.txt", table.encode())
        for path in files:
            name = path.name if path.parent == day.out else f"work/{path.relative_to(day.work)}"
            size = path.stat().st_size
            data = path.read_bytes() if size <= TOO_LARGE else b""
            # zlib's own bound on what it makes of what does not compress is a little more.
            packed = len(zlib.compress(data, 6)) + 1024
            if size > TOO_LARGE or packed > room:
                left.append(f"{name} ({size} bytes)")
                continue
            room -= packed
            _add(tar, name, data)
        _add(tar, "left_out.txt", "\n".join(left).encode())
    return target, left


def _cached(day: Day, path: Path) -> bool:
    return path.relative_to(day.work).parts[0] in CACHES


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(f"day/{name}")
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def table(day: Day) -> str:
    """What was right, how near the limits, how fast; then every unit that was not right."""
    states = unit_states(day)
    right = sum(ok is True for ok, _ in states.values())
    wrong = {name: why for name, (ok, why) in states.items() if ok is False}
    unrun = [name for name, (ok, _) in states.items() if ok is None]
    rows = [
        f"part {day.part}{' (dry)' if day.dry else ''}: {right} of {len(states)} units right,"
        f" {len(wrong)} wrong, {len(unrun)} not run"
    ]
    failures = [f"WRONG {name}: {' '.join(why.split())}"[:160] for name, why in wrong.items()]
    failures += [f"NOT RUN {', '.join(unrun)}"[:300]] if unrun else []
    # Failures matter most, but may not fill the table alone.
    failures = _cut(failures, 25)
    tables = [*_checks(day), *_times(day), *_sweeps(day), *_engines(day)]
    return "\n".join([*rows, *_cut(tables, MOST_LINES - 1 - len(failures)), *failures])


def _cut(rows: list[str], most: int) -> list[str]:
    if len(rows) <= most:
        return rows
    return [*rows[: most - 1], f"... and {len(rows) - most + 1} more in the archive"]


def _checks(day: Day) -> list[str]:
    count: dict[tuple[str, str], list[float]] = defaultdict(list)
    bad: dict[tuple[str, str], int] = defaultdict(int)
    for line in lines(day.out / "check.jsonl"):
        key = (line["op"], line["backend"])
        count[key].append(line["of_allowed"] if line["of_allowed"] is not None else 1e30)
        bad[key] += not line["ok"]
    return [
        f"check {op:<22}{backend:<8}{len(shares):>5} checks {bad[op, backend]:>4} wrong,"
        f" nearest {max(shares):.2g} of its limit"
        for (op, backend), shares in sorted(count.items())
    ]


def _times(day: Day) -> list[str]:
    found: dict[tuple[str, str, int, int], dict[str, float]] = defaultdict(dict)
    for line in lines(day.out / "time.jsonl"):
        key = (line["op"], line["dtype"], line["N"], line["V"])
        found[key][line["backend"]] = line["p50_ms"]
    return [
        f"time {op} {dtype} N={n} V={v}: "
        + ", ".join(f"{backend} {ms:.3g}" for backend, ms in times.items())
        + " ms"
        for (op, dtype, n, v), times in found.items()
    ]


def _sweeps(day: Day) -> list[str]:
    found: dict[tuple[str, str, int], list[dict]] = defaultdict(list)
    for line in lines(day.out / "sweep.jsonl"):
        found[line["kernel"], line["kind"], line["D"]].append(line)
    rows = []
    for (kernel, kind, width), own in found.items():
        timed = [line for line in own if line["correct"] and "p50_ms" in line]
        if not timed:
            rows.append(f"sweep {kernel} {kind} D={width}: none of {len(own)} settings was right")
            continue
        best = min(timed, key=lambda line: line["p50_ms"])
        setting = "/".join(str(best[key]) for key in ("rows", "items", "width", "warps", "stages"))
        rows.append(
            f"sweep {kernel} {kind} D={width}: {best['p50_ms']:.3g} ms at {setting},"
            f" {len(timed)} of {len(own)} right"
        )
    return rows


def _engines(day: Day) -> list[str]:
    rows = []
    for line in lines(day.out / "engine.jsonl"):
        if "seconds" in line:
            idle = f"{line['idle_share']:.0%} idle, " if line["idle_share"] is not None else ""
            rows.append(
                f"engine {line['sampler']} {line['backend']} {line['positions']} positions:"
                f" {line['seconds']:.3g} s, {idle}{line['syncs']} syncs"
            )
    for line in lines(day.out / "other.jsonl"):
        if "rate" in line:
            rows.append(f"ceiling {line['what']}: {line['rate']:.4g}")
        elif line["unit"].startswith("sanitizer"):
            rows.append(f"{line['unit']}: {line['what']} {line.get('said') or ''}"[:120])
    return rows
