"""What every benchmark shares: timing, the machine's ceilings, rows appended to a CSV."""

from __future__ import annotations

import csv
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

RESULTS = Path(__file__).parent / "results"


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    """One timed call, with the GPU waited for."""
    synchronise()
    started = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - started


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
    return {name: _percentiles(values) for name, values in times.items()}


def _percentiles(values: Sequence[float]) -> dict[str, float]:
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


def matmul_rate(size: int, dtype: torch.dtype = torch.float32) -> float:
    """FLOP per second of a square product: the arithmetic ceiling."""
    a = torch.randn(size, size, device=device(), dtype=dtype)
    best = min(seconds(lambda: a @ a) for _ in range(5))
    return 2 * size**3 / best


def peak_megabytes() -> float:
    """The GPU's peak allocation, or the process's peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip() or "unknown"


def append(what: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Append rows to results/<what>.csv with the machine, versions, commit and date in each.

    A row whose columns are not the file's is an error: rows of different columns do not
    belong into one file.
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
    path = RESULTS / f"{what}.csv"
    path.parent.mkdir(exist_ok=True)
    fresh = not path.exists()
    if not fresh:
        with path.open(newline="") as stream:
            header = next(csv.reader(stream))
        assert list(full[0]) == header, f"{path}: its columns are {header}"
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list(full[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(full)
        stream.flush()
        os.fsync(stream.fileno())
    print(f"{len(full)} rows appended to {path}")
    return path
