"""bench_merge_files.py: its rows, that it leaves nothing, and that a wrong merge stops it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import fisherkern as fk
from benchmarks import common
from benchmarks.speed import bench_merge_files

SMALL = ["--items", "3000", "--dim", "4", "--members", "3"]


@pytest.fixture(autouse=True)
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("method", "catalogue", "merged"),
    [("fisher", "runs", 3600), ("uniform", "shuffled", 3600)],
)
def test_a_row(method: str, catalogue: str, merged: int, tmp_path: Path, results: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    own = ["--method", method, "--catalogue", catalogue, "--folder", str(folder)]
    bench_merge_files.main([*SMALL, *own])
    assert not list(folder.iterdir())
    with (results / "merge_files.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert list(row)[: len(bench_merge_files.COLUMNS)] == bench_merge_files.COLUMNS
    assert int(row["merged_items"]) == merged
    files = 3 * 3000 * 4 * 4 * (2 if method == "fisher" else 1)
    assert files < float(row["files_gb"]) * 1e9 < 1.5 * files
    assert 0 < float(row["cpu_seconds"]) < 100 and 50 < float(row["peak_mb"]) < 4000


def test_a_wrong_merge_stops_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: Path
) -> None:
    right = fk.merge

    def wrong(models: Any, **given: Any) -> Any:
        merged = right(models, **given)
        with torch.no_grad():
            merged.item_embedding.weight[7, 1] += 1e-6
        return merged

    monkeypatch.setattr(bench_merge_files, "merge", wrong)
    with pytest.raises(SystemExit, match="item_embedding.weight differs from the merge in memory"):
        bench_merge_files.main([*SMALL, "--folder", str(tmp_path)])
    assert not results.exists()
