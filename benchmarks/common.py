"""What every benchmark shares: timing, the machine's ceilings, rows appended to a CSV."""

from __future__ import annotations

import csv
import ctypes
import datetime
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fisherkern.errors import InputError

# A machine that is given back takes its checkout along: rows may go elsewhere.
RESULTS = Path(os.environ.get("FISHERKERN_RESULTS") or Path(__file__).parent / "results")


def child_environment() -> dict[str, str]:
    """The environment of a child process that imports `benchmarks`, whatever its Python."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


# What `append` adds to every row.
MACHINE = ("device", "threads", "torch", "python", "commit", "date")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """One timed call, with the GPU waited for."""
    synchronise()
    started = clock()
    function()
    synchronise()
    return clock() - started


def alternate(
    providers: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, dict[str, float]]:
    """p20, p50 and p80 in milliseconds of every provider, after one warm-up call each.

    The providers take turns, so that what else the machine does falls on all of them.
    """
    for function in providers.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, function in providers.items():
            times[name].append(1e3 * seconds(function))
    return {name: percentiles(values) for name, values in times.items()}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 of times in milliseconds."""
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = torch.quantile(torch.tensor(values, dtype=torch.float64), quantiles)
    return dict(zip(("p20_ms", "p50_ms", "p80_ms"), found.tolist(), strict=True))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "CPU"


def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes read and written per second by a large copy: the memory ceiling."""
    source = torch.empty(megabytes * 2**18, device=device())
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.numel() * 4 / best


def matmul_rate(
    size: int, dtype: torch.dtype = torch.float32, clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOP per second of a square product: the arithmetic ceiling."""
    a = torch.randn(size, size, device=device(), dtype=dtype)
    best = min(seconds(lambda: a @ a, clock) for _ in range(5))
    return 2 * size**3 / best


def peak_megabytes() -> float:
    """The GPU's peak allocation, or the process's peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def with_peak(function: Callable[[], Any]) -> tuple[Any, float]:
    """The function's result, and how many MB above what was held before it went at its peak.

    Where neither a GPU nor Linux can reset the peak, it is the growth of the process's own.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        return function(), torch.cuda.max_memory_allocated() / 2**20 - before
    _release_freed()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before, peak = _status_megabytes("VmRSS"), lambda: _status_megabytes("VmHWM")
    except OSError:
        before, peak = peak_megabytes(), peak_megabytes
    return function(), max(0.0, peak() - before)


def _release_freed() -> None:
    """Give freed memory back to the system, as far as the C library can: else it counts as held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_megabytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**10
    raise OSError(f"/proc/self/status has no {field}")


def commit() -> str:
    """Of the checkout, or FISHERKERN_COMMIT where a copy of it has no history."""
    if given := os.environ.get("FISHERKERN_COMMIT"):
        return given
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip() or "unknown"


def results_path(what: str) -> Path:
    return RESULTS / f"{what}.csv"


def check_columns(what: str, columns: Sequence[str]) -> None:
    """Raise InputError if results/<what>.csv holds other columns than `columns` and the machine's.

    For the start of a long run, which `append` would else refuse at its end.
    """
    path = results_path(what)
    if not path.exists():
        return
    with path.open(newline="") as stream:
        header = next(csv.reader(stream), [])
    if header != [*columns, *MACHINE]:
        raise InputError(f"{path}: holds rows of other columns; move it away first")


def append(what: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Append rows to results/<what>.csv with the machine, versions, commit and date in each.

    Raises InputError as `check_columns` does: rows of different columns do not belong together.
    """
    about = {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    full = [{**row, **about} for row in rows]
    path = results_path(what)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_columns(what, list(rows[0]))
    fresh = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list(full[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(full)
        stream.flush()
        os.fsync(stream.fileno())
    return path
