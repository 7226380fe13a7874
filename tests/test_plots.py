"""Figures: real PNG files, whole or absent, that show what they were given."""

import sys

import numpy as np
import pytest

from fisherkern import plots
from fisherkern.errors import InputError
from fisherkern.plots import plot_fisher_cost, plot_plane, plot_sorted_probabilities

CURVES = {"trained": np.array([0.5, 0.25, 0.125, 0.0]), "untrained": np.full(4, 0.25)}
ROWS = [
    {"provider": "ours", "sampler": "topk", "k": 30, "seconds": 4.0, "error": 0.15},
    {"provider": "ours", "sampler": "topk", "k": 10, "seconds": 1.5, "error": 0.2},
    {"provider": "ours", "sampler": "exact", "k": 64, "seconds": 9.0, "error": 0.0},
]
GRID = np.linspace(-1, 2, 7)
PLANE = {"member 1": (0.0, 0.0), "member 2": (1.0, 0.0), "Fisher": (0.4, 0.3)}


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, to look inside."""
    saved = []
    save = plots._save

    def keep(figure, path):
        save(figure, path)
        saved.append(figure)

    monkeypatch.setattr(plots, "_save", keep)
    return saved


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_sorted_probabilities(tmp_path, figures):
    plot_sorted_probabilities(CURVES, tmp_path / "p.png")
    assert is_png(tmp_path / "p.png")
    (axes,) = figures[0].axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    trained, untrained = axes.lines
    assert trained.get_xdata().tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(trained.get_ydata(), [0.5, 0.25, 0.125, np.nan])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(CURVES)


def test_fisher_cost(tmp_path, figures):
    plot_fisher_cost(ROWS, tmp_path / "c.png")
    assert is_png(tmp_path / "c.png")
    left, right = figures[0].axes
    topk, exact = left.lines
    assert (topk.get_label(), exact.get_label()) == ("ours topk", "ours exact")
    assert topk.get_xdata().tolist() == [10, 30] and topk.get_ydata().tolist() == [1.5, 4.0]
    line, _, hollow = right.lines
    assert line.get_xdata().tolist() == [1.5, 4.0] and line.get_ydata().tolist() == [0.2, 0.15]
    # No error has no place on a logarithmic axis: it stands hollow on the bottom edge.
    assert hollow.get_ydata().tolist() == [right.get_ylim()[0]]
    assert hollow.get_markerfacecolor() == "white"
    for axes in (left, right):
        box = axes.get_position()
        assert box.width > 0.25 and box.height > 0.5  # the layout has not collapsed


def test_plane(tmp_path, figures):
    values = np.add.outer(GRID[:5], GRID)
    values[0, 0] = np.nan
    plot_plane(PLANE, GRID, GRID[:5], values, "NDCG@10", tmp_path / "plane.png")
    assert is_png(tmp_path / "plane.png")
    axes, bar = figures[0].axes
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines] == list(
        PLANE.values()
    )
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(PLANE)
    assert bar.get_ylabel() == "NDCG@10" and axes.get_aspect() == 1


def test_many_lines_stay_apart():
    styles = plots._styles()
    assert len({next(styles) for _ in range(28)}) == 28


def test_no_global_state_is_touched(tmp_path):
    plot_sorted_probabilities(CURVES, tmp_path / "p.png")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: plot_sorted_probabilities({}, path), "no curves"),
        (lambda path: plot_sorted_probabilities({"a": [0.1, np.nan]}, path), "curve 'a': expected"),
        (lambda path: plot_sorted_probabilities({"a": []}, path), "curve 'a': expected"),
        (lambda path: plot_fisher_cost([], path), "no rows"),
        (lambda path: plot_fisher_cost([{"sampler": "a", "k": 1}], path), "row 0 has no 'seconds'"),
        (lambda path: plot_fisher_cost([{**ROWS[0], "seconds": 0}], path), "row 0 needs k and"),
        (
            lambda path: plot_fisher_cost([{"k": 1, "seconds": 1, "error": 1}], path),
            "row 0 has no 'provider' or 'sampler'",
        ),
        (
            lambda path: plot_plane(PLANE, GRID, GRID[:5], np.zeros((7, 5)), "x", path),
            r"values have shape \(7, 5\), the grid needs \(5, 7\)",
        ),
        (
            lambda path: plot_plane(PLANE, GRID, GRID, np.full((7, 7), np.nan), "x", path),
            "no finite value",
        ),
    ],
)
def test_bad_input_is_named_and_leaves_no_file(draw, message, tmp_path):
    with pytest.raises(InputError, match=message):
        draw(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_drawing_leaves_the_old_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "p.png"
    path.write_bytes(b"old")

    def fail(self, target, **options):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(InputError, match="No space left on device"):
        plot_sorted_probabilities(CURVES, path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
