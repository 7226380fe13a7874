"""The figures: files of their own, drawn without a display and without global state."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fisherkern.errors import InputError
from fisherkern.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which survives colour blindness and grey printing, with markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

StrPath = str | os.PathLike[str]


def plot_sorted_probabilities(curves: Mapping[str, ArrayLike], path: StrPath) -> None:
    """How steeply softmax probabilities fall with rank (arXiv 2307.05476, Fig. 4).

    curves: label -> (n,) mean over sequences of the n largest probabilities, sorted
    falling. Both axes are logarithmic; a probability of 0 is left out. Written as PNG,
    whole or not at all. Raises InputError for no curve, or one that is not a non-empty
    array of finite numbers.
    """
    if not curves:
        raise InputError("plot_sorted_probabilities: no curves")
    figure, (axes,) = _figure(1)
    for (label, curve), (colour, _, dashes) in zip(curves.items(), _styles(), strict=False):
        values = _finite(f"plot_sorted_probabilities: curve {label!r}", curve)
        values = np.where(values > 0, values, np.nan)
        axes.plot(
            np.arange(1, len(values) + 1), values, label=label, color=colour, linestyle=dashes
        )
    axes.set(xscale="log", yscale="log", xlabel="rank of the item", ylabel="mean probability")
    axes.legend(frameon=False)
    _save(figure, path)


def plot_fisher_cost(rows: Sequence[Mapping[str, Any]], path: StrPath) -> None:
    """Draw what each Fisher estimate costs and how wrong it is (arXiv 2307.05476, Fig. 2).

    rows: mappings with "sampler" (or "provider", or both), "k" (items or probes),
    "seconds" and "error" (relative, against the exact diagonal; may be 0). Left: seconds
    against k; right: error against seconds, where down and to the left is better. A line
    for each pair of provider and sampler, by rising k. Logarithmic axes; an error of 0
    is drawn on the bottom edge with a hollow marker. Written as PNG, whole or not at all.
    """
    lines = _lines(rows)
    figure, (left, right) = _figure(2)
    errors = np.concatenate([line[:, 2] for line in lines.values()])
    floor = errors[errors > 0].min() / 3 if (errors > 0).any() else 1.0
    for (label, line), (colour, marker, dashes) in zip(lines.items(), _styles(), strict=False):
        k, seconds, error = line.T
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5}
        left.plot(k, seconds, label=label, linestyle=dashes, **style)
        right.plot(seconds, np.maximum(error, floor), linestyle=dashes, **style)
        exact = seconds[error == 0]
        if len(exact):  # an empty line that is not clipped breaks the layout
            style |= {"linestyle": "none", "markerfacecolor": "white", "clip_on": False}
            right.plot(exact, np.full(len(exact), floor), zorder=3, **style)
    left.set(xscale="log", yscale="log", xlabel="items or probes, k", ylabel="seconds")
    right.set(xscale="log", yscale="log", xlabel="seconds", ylabel="relative error")
    if (errors == 0).any():
        right.set_ylim(bottom=floor)
        right.set_title("hollow: no error", fontsize="medium", loc="right")
    for axes in (left, right):
        _plain_ticks(axes)
    figure.legend(loc="outside right upper", frameon=False)
    _save(figure, path)


def plot_plane(
    points: Mapping[str, tuple[float, float]],
    grid_x: np.ndarray,
    grid_y: np.ndarray,
    values: np.ndarray,
    label: str,
    path: StrPath,
) -> None:
    """Draw a metric on the plane through three members, with the merges (same paper, Fig. 3).

    points: name -> (x, y) in plane coordinates; grid_x (nx,) and grid_y (ny,) rising;
    values (ny, nx) the metric there, NaN where it was not measured; label: its name, for
    the colour bar. Both axes have one scale. Written as PNG, whole or not at all.
    Raises InputError where shapes do not fit or nothing was measured.
    """
    values = np.asarray(values, dtype=np.float64)
    grid_x = _finite("plot_plane: grid_x", grid_x)
    grid_y = _finite("plot_plane: grid_y", grid_y)
    if values.shape != (len(grid_y), len(grid_x)) or min(values.shape) < 2:
        raise InputError(
            f"plot_plane: values have shape {values.shape}, the grid needs "
            f"({len(grid_y)}, {len(grid_x)}), and 2 by 2 at least"
        )
    if not np.isfinite(values).any():
        raise InputError("plot_plane: no finite value")
    figure, (axes,) = _figure(1)
    masked = np.ma.masked_invalid(values)
    filled = axes.contourf(grid_x, grid_y, masked, levels=16, cmap="viridis")
    figure.colorbar(filled, ax=axes, label=label)
    for (name, (x, y)), (colour, marker, _) in zip(points.items(), _styles(), strict=False):
        style: dict[str, Any] = {"markersize": 9, "markeredgecolor": "white"}
        style["markerfacecolor"] = colour
        axes.plot(x, y, marker, label=name, clip_on=False, zorder=3, **style)
    if points:
        # Beside the plane, not at the points: merges lie close together.
        columns = min(3, len(points), max(1, 48 // max(map(len, points))))
        figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    axes.set(xlabel="distance along the first direction", ylabel="distance along the second")
    axes.set_aspect("equal")
    _save(figure, path)


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    # A Figure with its own Agg canvas: pyplot would keep global state and may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.9) if panels == 1 else (10.4, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _styles() -> Iterator[tuple[str, str, str]]:
    """(colour, marker, dashes), all different for the first 28."""
    for dashes in itertools.cycle(("-", "--", ":", "-.")):
        for colour, marker in zip(COLOURS, MARKERS, strict=True):
            yield colour, marker, dashes


def _finite(what: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise InputError(f"{what}: expected a non-empty list of finite numbers")
    return array


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Label -> (points, 3): k, seconds, error, by rising k."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for index, row in enumerate(rows):
        label = " ".join(str(row[key]) for key in ("provider", "sampler") if key in row)
        try:
            point = (float(row["k"]), float(row["seconds"]), float(row["error"]))
        except KeyError as missing:
            raise InputError(f"plot_fisher_cost: row {index} has no {missing}") from None
        if not label:
            raise InputError(f"plot_fisher_cost: row {index} has no 'provider' or 'sampler'")
        if not np.isfinite(point).all() or min(point[:2]) <= 0 or point[2] < 0:
            raise InputError(
                f"plot_fisher_cost: row {index} needs k and seconds above 0 and error from 0, "
                f"got {point}"
            )
        points.setdefault(label, []).append(point)
    if not points:
        raise InputError("plot_fisher_cost: no rows")
    return {label: np.array(sorted(line)) for label, line in points.items()}


def _plain_ticks(axes: Axes) -> None:
    """1, 2, 5, 10 instead of powers of ten: the axes span one or two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, path: StrPath) -> None:
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
