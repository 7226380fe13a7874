"""bench_catalogue.py and bench_head.py: their rows, and that a wrong op stops them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import common
from benchmarks.speed import bench_catalogue, bench_head
from fisherkern import ops


@pytest.fixture(autouse=True)
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_catalogue_row_adds_up(results: Path) -> None:
    row = bench_catalogue.measure(700, 8, 4, 5, "distinct", torch.get_num_threads())
    assert list(row) == bench_catalogue.COLUMNS
    assert (row["sampler"], row["V"], row["k"]) == ("distinct", 700, 5)
    whole = row["statistics_s"] + row["factor_s"] + row["head_s"]
    assert row["whole_over_products"] == pytest.approx(whole / row["two_products_s"])
    assert row["head_over_products"] == pytest.approx(row["head_s"] / row["two_products_s"])
    assert row["weights_mb"] == pytest.approx(2 * 700 * 4 * 4 / 2**20)


def test_two_products_are_those_of_the_closed_form() -> None:
    layer = bench_catalogue.Layer(700, 8, 4)
    layer.two_products(tile=300)
    expected = (layer.h @ layer.weight.T).T @ layer.h.square()
    torch.testing.assert_close(layer.fisher, expected)


@pytest.mark.parametrize("op", ["softmax_topk", "softmax_sketch", "sample_distinct"])
def test_bench_catalogue_stops_at_a_wrong_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_catalogue, "CHECKED_ITEMS", 900)
    bench_catalogue.check(4, 3, 5)
    right = getattr(ops, op)

    def wrong(*arguments: object) -> tuple[torch.Tensor, ...]:
        first, second, *rest = right(*arguments)
        return first.flip(0), second, *rest

    monkeypatch.setattr(ops, op, wrong)
    with pytest.raises(SystemExit, match="bench_catalogue: "):
        bench_catalogue.main(["--items", "300"])


def test_bench_head(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("copy_bandwidth", "matmul_rate"):
        monkeypatch.setattr(bench_head, name, lambda *_: 1e9)
    arguments = ["--items", "700", "--widths", "4", "--sequences", "8", "--repeats", "1"]
    bench_head.main(arguments)
    found = rows_of(results / "head.csv")
    assert {row["op"] for row in found} == set(bench_head.OPS) and len(found) == 6
    assert list(found[0])[: len(bench_head.COLUMNS)] == bench_head.COLUMNS
    right = ops.softmax_mean
    monkeypatch.setattr(ops, "softmax_mean", lambda *given: [2 * t for t in right(*given)])
    with pytest.raises(SystemExit, match="bench_head: softmax_mean at V=700 D=4 is off"):
        bench_head.main(arguments)
    assert len(rows_of(results / "head.csv")) == 6
