"""bench_training.py: what it counts, the check it starts with, and the processes it drives."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

import fisherkern as fk
from benchmarks import common, figures, readme_tables
from benchmarks.speed import bench_training
from benchmarks.speed.trainers import train_fisherkern

SIZES = ["--data", "synthetic", "--max-len", "5", "--dim", "4", "--batch", "64", "--steps", "2"]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_training, "matmul_rate", lambda *_, **__: 1e9)
    return tmp_path


def test_rows_of_ours(results, tmp_path, capsys):
    threads = str(torch.get_num_threads())
    bench_training.main([*SIZES, "--threads", threads, "--out", str(tmp_path / "scratch")])
    with (results / "training.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["model"] for row in rows] == ["BERT4Rec", "SASRec"]
    assert list(rows[0]) == [*bench_training.COLUMNS, *common.MACHINE]
    for row in rows:
        value = {k: float(row[k]) for k in ("targets_per_step", "targets_per_s", "p50_ms")}
        assert row["ours_faster"] == "1.0" and row["steps"] == "2"
        assert value["targets_per_s"] * value["p50_ms"] / 1e3 == pytest.approx(
            value["targets_per_step"]
        )
        steps = -(-fk.load("synthetic").num_users // 64)
        assert int(row["steps_per_pass"]) == steps
        assert float(row["seconds_per_pass"]) == pytest.approx(value["p50_ms"] / 1e3 * steps)
        assert float(row["peak_mb"]) >= float(row["prepared_mb"]) > 50
        assert float(row["gflop_per_step"]) > 0
    assert "RecBole      skipped: --recbole-python is not given" in capsys.readouterr().out
    assert readme_tables.training_rows(model="SASRec").count("| fisherkern ") == 1


def test_targets_are_places_of_the_loss(monkeypatch):
    # Windows of 2 and 5 items, then 1 of each masked: round(.2 * 2) is at least 1.
    data = fk.SequenceDataset(
        "x", [1, 2, 9, 9, 1, 2, 3, 4, 5, 9, 9], [0, 4, 11], [str(i) for i in range(9)], ["a", "b"]
    )
    monkeypatch.setattr(train_fisherkern.fk, "load", lambda _: data)
    options = {"data": "x", "max_len": 6, "dim": 4, "layers": 1, "batch": 2}
    for model, expected in (("BERT4Rec", 2), ("SASRec", 1 + 4)):
        trainer = train_fisherkern.prepare({**options, "model": model})
        (batch,) = trainer.batches()
        assert trainer.steps == 1 and trainer.targets(batch) == expected


@pytest.mark.parametrize("model", bench_training.MODELS)
def test_a_wrong_loss_stops_it(results, monkeypatch, model):
    right = train_fisherkern.TrainLoop.step

    def off(self, tokens):
        loss, *rest = right(self, tokens)
        return 1.0001 * loss, *rest

    monkeypatch.setattr(train_fisherkern.TrainLoop, "step", off)
    with pytest.raises(SystemExit, match=f"{model}'s loss is off by 0.0001; stopped"):
        bench_training.main([*SIZES, "--models", model])
    assert not (results / "training.csv").exists()


def test_a_library_that_fails_is_named(results, tmp_path):
    arguments = [*SIZES, "--models", "SASRec", "--out", str(tmp_path / "scratch")]
    with pytest.raises(SystemExit, match=r"RecBole \(.*\) gave up"):
        bench_training.main([*arguments, "--recbole-python", sys.executable])
    assert not (results / "training.csv").exists()
    atomic = (tmp_path / "scratch/synthetic/synthetic.inter").read_text().splitlines()
    data = fk.load("synthetic")
    assert len(atomic) == 1 + data.num_actions
    assert atomic[0] == "user_id:token\titem_id:token\ttimestamp:float"
    assert atomic[1:3] == [f"1\t{item}\t{t}" for t, item in enumerate(data.sequence(0)[:2])]
