"""bench_processes.py: a group beside one process, and the check that it starts with."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import fisherkern as fk
from benchmarks import common
from benchmarks.speed import bench_processes

SIZES = ["--data", "synthetic", "--max-len", "5", "--dim", "4", "--layers", "1", "--turns", "1"]


def test_rows_of_one_and_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    bench_processes.main([*SIZES, "--sequences", "64", "--batch", "32", "--items", "50"])
    with (tmp_path / "processes.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [*bench_processes.COLUMNS, *common.MACHINE]
    found = [(row["work"], row["processes"], row["sequences"]) for row in rows]
    users = str(fk.load("synthetic").num_users)
    expected = {"fisher": "64", "evaluate": users, "merge": "50"}
    assert found == [(work, p, number) for work, number in expected.items() for p in "12"]
    for row in rows:
        rate = float(row["sequences_per_s"]) * float(row["p50_ms"]) / 1e3
        assert rate == pytest.approx(int(row["sequences"]))
        assert float(row["efficiency"]) == float(row["faster"]) / int(row["processes"])
    assert "times one's speed" in capsys.readouterr().out


class _Answers:
    """A group that answers what it is given."""

    world = 1

    def __init__(
        self, folder: Path, ranks: list[int], value: float, merged: str, world: int
    ) -> None:
        self.folder, self.ranks, self.times = folder, ranks, {}
        self.world = world
        fisher = fk.DiagFisher({"w": torch.tensor([1.0, value])}, {})
        for rank in range(self.world):
            fisher.save(folder / f"{self.world}-{rank}.safetensors")

        (folder / f"merged-{self.world}.safetensors").write_text(merged)

    def turn(self, work: str) -> list[dict[str, Any]]:
        return [{"ranks": self.ranks}]


@pytest.mark.parametrize(
    ("ranks", "value", "merged", "message"),
    [
        ([1, 3], 0.5, "x", "ranks"),
        ([1, 2], 0.5 + 1e-5, "x", "off by 1e-05"),
        ([1, 2], 0.5, "y", "merged file"),
    ],
)
def test_other_results_stop_it(
    tmp_path: Path, ranks: list[int], value: float, merged: str, message: str
) -> None:
    one = _Answers(tmp_path, [1, 2], 0.5, "x", 1)
    with pytest.raises(SystemExit, match=message):
        two = _Answers(tmp_path, ranks, value, merged, 2)
        bench_processes.check(one, two)  # type: ignore[arg-type]
