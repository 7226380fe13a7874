"""Figures from the benchmarks' CSV files: python -m benchmarks.figures ml-1m 50 256"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, results_path
from fisherkern.plots import _figure, _save, _styles


def read_rows(what: str, **chosen: str) -> list[dict[str, str]]:
    """The rows of results/<what>.csv with these values."""
    with results_path(what).open(newline="") as stream:
        return [r for r in csv.DictReader(stream) if all(r[c] == v for c, v in chosen.items())]


def latest_fisher_rows(**chosen: str) -> list[dict[str, str]]:
    """bench_fisher.py's rows, the last one where an estimate was run again."""

    def key(row: dict[str, str]) -> tuple[str, ...]:
        # A rival's number of sequences is what the limit allowed, not part of what it is.
        sequences = "" if row["off"] else row["sequences"]
        return (*(row[c] for c in ("data", "T", "D", "provider", "k")), sequences)

    return list({key(row): row for row in read_rows("fisher", **chosen)}.values())


def draw_figure(data: str, max_len: int, sequences: int) -> Path:
    """The paper's Figure 2, milliseconds a sequence against size, and the error beside it.

    Estimates of ours on another number of sequences are left out.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in latest_fisher_rows(data=data, T=str(max_len)):
        if not row["off"] and row["sequences"] != str(sequences):
            continue
        point = (float(row["k"]), float(row["p50_ms_per_sequence"]), float(row["error"]))
        lines.setdefault(row["provider"], []).append(point)
    # No error has no place on a logarithmic axis: it stands on the bottom edge, hollow.
    floor = min((p[2] for line in lines.values() for p in line if p[2] > 0), default=1.0) / 3
    figure, (left, right) = _figure(2)
    for (provider, points), (colour, marker, dashes) in zip(lines.items(), _styles(), strict=False):
        k, ms, error = np.array(sorted(points)).T
        style = {"color": colour, "marker": marker, "markersize": 5, "clip_on": False}
        left.plot(k, ms, label=provider, linestyle=dashes, **style)
        right.plot(ms, np.maximum(error, floor), linestyle=dashes, **style)
        if (error == 0).any():
            hollow = {**style, "linestyle": "none", "markerfacecolor": "white", "zorder": 3}
            right.plot(ms[error == 0], np.full((error == 0).sum(), floor), **hollow)
    left.set(xlabel="items, probes or products, K", ylabel="milliseconds a sequence")
    right.set(xlabel="milliseconds a sequence", ylabel="error, best-scaled", ylim=(floor, 1.2))
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    # Sizes span a decade or two, where powers of ten alone would leave few labels.
    left.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    path = RESULTS / f"fisher_{data}_T{max_len}.png"
    _save(figure, path)
    return path


if __name__ == "__main__":
    print(draw_figure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
