"""Units `engine:SAMPLER:BACKEND:POSITIONS`: diag_fisher of real histories at sizes of a pass."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import fisherkern as fk
from benchmarks.gpu.day import Day
from fisherkern.fisher.schedule import Schedule

SEQUENCES, WARM = 512, 64


def set_positions(count: int) -> None:
    """Set the positions of a backward pass; what else bounds one stays as it is."""
    own = Schedule.of

    def of(device: torch.device) -> Schedule:
        return dataclasses.replace(own(device), positions=count)

    Schedule.of = of  # type: ignore[method-assign,assignment]


def subject(day: Day, sequences: int) -> tuple[Any, list[Any], str]:
    """(model, batches, what they are): what travels along, or something drawn."""
    path = day.carried / "bert4rec.safetensors"
    if path.exists() and not day.dry:
        os.environ["FISHERKERN_DATA"] = str(day.carried)
        model = fk.load_model(path).to(day.device).eval()
        data = fk.load("ml-1m")
        loader = data.loader(split="train", batch_size=256, max_len=model.max_len, limit=sequences)
        moved = [{name: t.to(day.device) for name, t in batch.items()} for batch in loader]
        return model, moved, "ml-1m, trained"
    items, length, dim = (40, 5, 8) if day.dry else (3416, 200, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = fk.BERT4Rec(items, max_len=length, dim=dim).to(day.device).eval()
    g = torch.Generator().manual_seed(0)
    n = 4 if day.dry else sequences
    history = torch.randint(1, items + 1, (n, length), generator=g).to(day.device)
    return model, [{"history": part} for part in history.split(256)], "drawn, untrained"


def run(day: Day, unit: str, sampler: str, backend: str, positions: str) -> None:
    """Seconds, synchronisations and the share of the time in which no kernel ran."""
    set_positions(int(positions))
    model, batches, what = subject(day, SEQUENCES)
    given = {"sampler": sampler, "backend": backend, "progress": False}
    if sampler != "exact":
        given["k"] = 10
    few = [{name: t[:WARM] for name, t in batches[0].items()}]
    line: dict[str, Any] = {"sampler": sampler, "backend": backend, "positions": int(positions)}
    line["what"] = what
    line["sequences"] = sum(len(batch["history"]) for batch in batches)
    with day.alone():
        fk.diag_fisher(model, few, **given)
        line["seconds"] = _seconds(day, lambda: fk.diag_fisher(model, batches, **given))
        if day.device == "cuda":
            line["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        line["syncs"] = _syncs(day, lambda: fk.diag_fisher(model, batches, **given))
        trace = day.work / f"trace-{sampler}-{backend}-{positions}.json.gz"
        busy = _busy(day, lambda: fk.diag_fisher(model, batches, **given), None)
        _busy(day, lambda: fk.diag_fisher(model, few, **given), trace)
    line["kernel_seconds"] = busy
    line["idle_share"] = max(0.0, 1 - busy / line["seconds"]) if day.device == "cuda" else None
    day.emit("engine", unit=unit, ok=True, **line)


def _seconds(day: Day, function: Any) -> float:
    if day.device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if day.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _syncs(day: Day, function: Any) -> int | None:
    """How often the host waited for the GPU, as PyTorch itself warns of it."""
    if day.device != "cuda":
        function()
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in said)


def _busy(day: Day, function: Any, trace: Path | None) -> float:
    """Seconds of all kernels together (of operators on a CPU); a trace where one is asked for."""
    kinds = torch.profiler.ProfilerActivity
    gpu = day.device == "cuda"
    activities = [kinds.CPU, kinds.CUDA] if gpu and trace else [kinds.CUDA if gpu else kinds.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        if gpu:
            torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
        return 0.0
    name = "self_device_time_total" if gpu else "self_cpu_time_total"
    return sum(getattr(event, name) for event in profiler.key_averages()) / 1e6
