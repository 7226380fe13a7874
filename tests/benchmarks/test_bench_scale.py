"""bench_scale.py: its rows, that it leaves nothing, and that a wrong result stops it."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

import fisherkern as fk
from benchmarks import common
from benchmarks.speed import bench_merge_files, bench_scale

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory")


@pytest.fixture(autouse=True)
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def row_of(results: Path) -> dict[str, str]:
    with (results / "scale.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert list(row)[: len(bench_scale.COLUMNS)] == bench_scale.COLUMNS
    return row


def test_a_merge_by_two_processes(tmp_path: Path, results: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    sizes = ["--items", "3000", "--dim", "4", "--members", "3", "--processes", "2"]
    bench_scale.main(["merge", *sizes, "--folder", str(folder)])
    assert not list(folder.iterdir())
    row = row_of(results)
    assert row["case"] == "uniform, same" and row["processes"] == "2" and row["sequences"] == ""
    table = 3000 * 4 * 4 / 1e9
    assert 3 * table < float(row["input_gb"]) < 9 * table
    assert table < float(row["output_gb"]) <= float(row["written_gb"]) * 1.01
    assert float(row["read_gb"]) > 6 * table
    assert 0 < float(row["copy_seconds"]) < 100 and 50 < float(row["anon_mb"]) < 2000


def test_what_is_held_beyond_the_model(results: Path) -> None:
    sizes = ["--items", "50000", "--dim", "8", "--sequences", "4"]
    bench_scale.main(["fisher", "--samplers", "topk", *sizes])
    row = row_of(results)
    assert row["case"] == "topk" and row["members"] == "" and row["dtype"] == "F32"
    table = 50_000 * 8 * 4 / 2**20
    assert table < float(row["result_mb"]) < 2 * table
    assert 0 < float(row["anon_mb"]) < 1000


def test_wrong_results_stop_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = fk.diag_fisher

    def wrong(*given, **settings):  # type: ignore[no-untyped-def]
        fisher = right(*given, **settings)
        fisher["item_embedding.weight"][3, 1] *= 1.001
        return fisher

    monkeypatch.setattr(fk, "diag_fisher", wrong)
    with pytest.raises(SystemExit, match="Fisher of item_embedding.weight differs"):
        bench_scale.main(["fisher"])
    monkeypatch.setattr(bench_merge_files, "merge", lambda models, **given: models[1])
    with pytest.raises(SystemExit, match="differs from the merge in memory"):
        bench_scale.main(["merge", "--members", "2", "--dim", "4", "--folder", str(tmp_path)])
