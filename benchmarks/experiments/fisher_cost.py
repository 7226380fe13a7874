"""Time and error of every sampler against the exact Fisher: the paper's Figure 2 with an error."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkern.encoders import SequenceEncoder
from fisherkern.fisher import DiagFisher, diag_fisher

# Sampler, reduction and sizes (K items, or R probes) of each line of the figure.
LINES: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("topk", "batchwise", (10, 30, 50)),
    ("topk", "sequence", (10, 30, 50)),
    ("model", "sequence", (10, 30, 50)),
    ("random", "sequence", (10, 30, 50)),
    ("target", "sequence", (1,)),
    ("sketch", "sequence", (4, 8, 16)),
    ("exact", "sequence", (8, 16, 32)),
)


def relative_error(estimate: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """‖F − F₀‖ / ‖F₀‖ over all entries of all tensors."""
    difference = sum(float((estimate[n].double() - exact[n]).square().sum()) for n in exact)
    return (difference / sum(float(exact[n].double().square().sum()) for n in exact)) ** 0.5


def best_scaled_error(estimate: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """min over c of ‖c F − F₀‖ / ‖F₀‖: the error of the direction alone.

    1 where F is zero, or everything that it has is zero in F₀.
    """
    dot = sum(float((estimate[n].double() * exact[n]).sum()) for n in exact)
    square = sum(float(estimate[n].double().square().sum()) for n in exact)
    reference = sum(float(exact[n].double().square().sum()) for n in exact)
    return max(0.0, 1 - dot * dot / (square * reference)) ** 0.5 if square > 0 else 1.0


def fisher_cost(
    model: SequenceEncoder, batches: Sequence[Any], *, seed: int = 0, progress: bool = True
) -> list[dict[str, Any]]:
    """One row per line and size: seconds, relative error, best-scaled error, scale.

    `batches` is what `diag_fisher` takes, with targets. Seconds are the better of two runs
    after a warm-up, in this process and with its threads; the last row is the exact
    Fisher that the others are measured against.
    """

    def timed(**choice: Any) -> tuple[DiagFisher, float]:
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            fisher = diag_fisher(model, batches, seed=seed, progress=False, **choice)
            seconds.append(time.perf_counter() - started)
        return fisher, min(seconds)

    diag_fisher(model, batches, k=2, progress=False)
    exact, exact_seconds = timed(sampler="exact")
    runs = [
        (sampler, reduction, size)
        for sampler, reduction, sizes in LINES
        for size in sizes
        if size <= _limit(sampler, model, exact)
    ]
    rows = []
    for sampler, reduction, size in runs:
        if progress:
            print(f"  {reduction} {sampler} {size}", flush=True)
        extra: dict[str, Any] = {"probes" if sampler in ("sketch", "exact") else "k": size}
        fisher, seconds = timed(sampler=sampler, reduction=reduction, **extra)
        rows.append(_row(sampler, reduction, size, seconds, fisher, exact))
    rows.append(_row("exact", "sequence", exact.meta["probes"], exact_seconds, exact, exact))
    return rows


def _limit(sampler: str, model: SequenceEncoder, exact: DiagFisher) -> int:
    """The largest size that says something: fewer probes than exact, no more items than V."""
    probing = sampler in ("sketch", "exact")
    return exact.meta["probes"] - 1 if probing else model.num_items


def _row(
    sampler: str, reduction: str, size: int, seconds: float, fisher: DiagFisher, exact: DiagFisher
) -> dict[str, Any]:
    total = sum(float(t.double().sum()) for t in exact.values())
    name = "batchwise (paper)" if reduction == "batchwise" else sampler
    return {
        "provider": name,
        "sampler": sampler,
        "reduction": reduction,
        "k": size,
        "seconds": seconds,
        "error": best_scaled_error(fisher, exact),
        "relative_error": relative_error(fisher, exact),
        "scale": sum(float(t.double().sum()) for t in fisher.values()) / total,
        "num_sequences": fisher.meta["num_sequences"],
        "threads": torch.get_num_threads(),
    }


def cost_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| estimate | K or R | seconds | error, best-scaled | relative error | scale |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['provider']} | {row['k']} | {row['seconds']:.2f} | {row['error']:.3f}"
        f" | {row['relative_error']:.3g} | {row['scale']:.3g} |"
        for row in rows
    ]
    return "\n".join(lines)
