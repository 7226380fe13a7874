"""`fisherkern demo`, small: its table is that of evaluate and compare, it resumes, it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fisherkern as fk
from fisherkern import demo
from fisherkern.cli import main
from fisherkern.data import write_seqrec
from fisherkern.files import read_json

ROWS = ["base", "member 1", "member 2", "member 3", "all users, same compute"]
ROWS += ["uniform merge", "Fisher merge", "score ensemble"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "small.txt"
    write_seqrec(fk.synthetic(90, 40, clusters=8), path)
    return str(path)


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few epochs of large steps, after which members and merges differ."""
    steps = {"batch_size": 16, "lr": 1e-2, "warmup_steps": 1, "crop": "all"}
    monkeypatch.setattr(demo, "TRAINING", steps)
    monkeypatch.setattr(demo, "BASE_EPOCHS", 3)
    monkeypatch.setattr(demo, "MEMBER_EPOCHS", 3)


def run(data: str, out: Path, *more: str) -> int:
    return main(["demo", "--data", data, "--out", str(out), "--quiet", *more])


def files(folder: Path) -> dict[str, bytes]:
    """Every file but result.json, which holds the folder's name."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "result.json"}


@pytest.fixture
def whole(small: str, tmp_path: Path) -> Path:
    assert run(small, tmp_path / "whole") == 0
    return tmp_path / "whole"


def test_the_table_is_of_evaluate_and_compare(
    small: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, result = fk.load(small), read_json(whole / "result.json")
    assert list(result["rows"]) == ROWS and result["arguments"]["data"] == small
    members = [fk.load_model(whole / f"member-{n}.safetensors") for n in (1, 2, 3)]
    fishers = [fk.DiagFisher.load(whole / f"member-{n}.fisher.safetensors") for n in (1, 2, 3)]
    assert [fisher.meta["num_sequences"] for fisher in fishers] == [30, 30, 30]
    merged = {
        "uniform merge": fk.merge(members, method="uniform"),
        "Fisher merge": fk.merge(members, method="fisher", fishers=fishers),
    }
    reports = {name: fk.evaluate(model, data) for name, model in merged.items()}
    for name, report in reports.items():
        assert result["rows"][name] == dict(report)
    assert reports["uniform merge"]["ndcg@10"] != reports["Fisher merge"]["ndcg@10"]
    validation = {
        name: fk.evaluate(model, data, split="validation")["ndcg@10"]
        for name, model in zip(ROWS[1:4], members, strict=True)
    }
    best = max(validation, key=lambda name: validation[name])
    assert result["best_member"] == best
    gap = fk.compare(reports["Fisher merge"], fk.evaluate(members[int(best[-1]) - 1], data))
    cell = f"{gap['ndcg@10'].mean:+.4f} ± {1.96 * gap['ndcg@10'].standard_error:.4f}"
    table = (whole / "table.md").read_text()
    (row,) = (line for line in table.splitlines() if line.startswith("| Fisher merge |"))
    assert row.split(" | ")[3] == cell and f"| {best} (best member) |" in table
    saved = fk.load_model(whole / "merged.safetensors")
    assert fk.evaluate(saved, data)["ndcg@10"] == result["rows"][result["merged"]]["ndcg@10"]
    assert read_json(whole / "merged.json")["metrics"] == result["rows"][result["merged"]]


def test_an_interrupted_demo_goes_on_to_the_same_files(
    small: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, train, names = tmp_path / "parts", fk.train, list[str]()

    def interrupted(*given: Any, **how: Any) -> Any:
        names.append(how["state"].name)
        if len(names) == 3:
            raise KeyboardInterrupt
        return train(*given, **how)

    monkeypatch.setattr(fk, "train", interrupted)
    assert run(small, out) == 130
    assert not (out / "result.json").exists() and (out / "member-1.safetensors").exists()
    assert run(small, out) == 0
    assert names == [
        f"{name}.state.safetensors"
        for name in ("base", "member-1", "member-2", "member-2", "member-3", "all-users")
    ]
    assert files(out) == files(whole)
    assert not any("state" in name for name in files(out))


def test_a_folder_of_another_run_is_refused(
    small: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(whole)
    assert run(small, whole, "--seed", "1") == 2
    assert "config.json: holds a run with other data or another seed" in capsys.readouterr().err
    assert files(whole) == before
