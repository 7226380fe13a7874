"""Tables made in pieces: the same bytes again, what a short call leaves, cells as by compare."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import fisherkern as fk
from benchmarks.experiments import Experiment, artifacts, run_table
from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.experiment import RowBuilders
from benchmarks.experiments.reports import load_reports, save_reports
from benchmarks.experiments.tables import comparison_rows, comparison_table
from fisherkern.evaluation import Protocol
from fisherkern.files import read_json

ReadFiles = Callable[[Path], dict[str, bytes]]

TINY: dict[str, Any] = {"max_len": 8, "dim": 8, "batch_size": 32, "validation_users": 20}


@dataclasses.dataclass(frozen=True)
class Two(Experiment):
    """Two models from one base, and their mean."""

    ENSEMBLE: ClassVar = "both"

    def rankings(self) -> dict[str, str]:
        return {"NDCG@10 of all": "keep"}

    def references(self) -> dict[str, Sequence[str]]:
        return {"best": ["a", "b"], "base": ["base"]}

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        base = partial(self.common_base, cache, fk.MaskedItems(), 3)

        def tuned(name: str, seed: int) -> fk.BERT4Rec:
            return cache.train(name, base, fk.MaskedItems(), epochs=2, seed=seed, **self.training())

        a, b = partial(tuned, "a", 1), partial(tuned, "b", 2)
        return {
            "base": base,
            "a": a,
            "b": b,
            "mean": lambda: cache.merged("mean", [a(), b()], method="uniform"),
            "both": lambda: fk.ScoreEnsemble([a(), b()]),
        }


@pytest.fixture(scope="module")
def whole(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run_table(Two.on(small, **TINY), out, seeds=(0, 1), progress=False)
    return out


def test_cells_are_those_of_evaluate_and_compare(small: str, whole: Path) -> None:
    data, result = fk.load(small), read_json(whole / "result.json")
    assert result["missing"] == {} and [t["seed"] for t in result["tables"]] == [0, 1, "mean"]
    reports: dict[Any, dict[str, fk.Report]] = {}
    for table in result["tables"][:2]:
        folder = whole / f"seed-{table['seed']}"
        models: dict[str, Any] = {
            name: fk.load_model(folder / f"{name}.safetensors")
            for name in ("base", "a", "b", "mean")
        }
        models["both"] = fk.ScoreEnsemble([models["a"], models["b"]])
        validation = {n: fk.evaluate(m, data, split="validation") for n, m in models.items()}
        test = reports[table["seed"]] = {n: fk.evaluate(m, data) for n, m in models.items()}
        best = max("ab", key=lambda name: validation[name]["ndcg@10"])
        gain = fk.compare(test["both"], test[best])["ndcg@10"]
        assert [row["model"] for row in table["rows"]] == list(models)
        for row in table["rows"]:
            name = row["model"]
            assert {metric: row[metric] for metric in test[name]} == dict(test[name])
            assert row["validation_ndcg@10"] == validation[name]["ndcg@10"]
            for title, reference in (("best", best), ("base", "base")):
                expected = fk.compare(test[name], test[reference])["ndcg@10"]
                cell = {"model": reference, **dataclasses.asdict(expected)}
                assert row["over"][title] == cell
            assert row["chosen"] == (name == best)
            kept = fk.evaluate(models[name], data, seen="keep")["ndcg@10"]
            assert row["columns"] == {"NDCG@10 of all": kept}
            if gain.low <= 0:
                assert row["share_of_ensemble_gain"] is None
        assert {len(row["about"]) for row in table["rows"]} == {0, 1, 2}
    for row in result["tables"][2]["rows"]:
        name, reference = row["model"], row["over"]["best"]["model"]
        pairs = [reports[seed] for seed in (0, 1)]
        each = [np.mean([p[n].per_user["ndcg@10"] for p in pairs], 0) for n in (name, reference)]
        gap = each[0] - each[1]
        assert row["over"]["best"]["mean"] == pytest.approx(gap.mean(), abs=1e-12)
        error = gap.std(ddof=1) / np.sqrt(len(gap))
        assert row["over"]["best"]["standard_error"] == pytest.approx(error, abs=1e-12)


def test_a_second_call_trains_nothing_and_writes_the_same_bytes(
    files: ReadFiles,
    small: str,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = files(whole)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    for name in ("train", "merge", "evaluate", "diag_fisher"):
        monkeypatch.setattr(artifacts, name, never)
    run_table(Two.on(small, **TINY), whole, seeds=(0, 1), progress=False)
    assert files(whole) == before
    assert not any("state" in name for name in before)


def stop_after(monkeypatch: pytest.MonkeyPatch, looks: int) -> Callable[[], None]:
    """A clock whose hour comes after `looks` looks at it; the returned function stops it."""
    seen = iter(range(looks + 1))
    monkeypatch.setattr(
        artifacts.time, "monotonic", lambda: 0.0 if next(seen, None) is not None else 1e9
    )
    return monkeypatch.undo


@pytest.mark.parametrize(
    ("looks", "rows", "training"),
    [(0, 0, False), (5, 0, True), (7, 0, False), (8, 1, False), (12, 1, True), (13, 1, False)],
)
def test_what_a_short_call_leaves_is_a_table_that_goes_on(
    files: ReadFiles,
    small: str,
    whole: Path,
    tmp_path: Path,
    looks: int,
    rows: int,
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = stop_after(monkeypatch, looks)
    experiment = Two.on(small, **TINY)
    part = run_table(experiment, tmp_path, seeds=(0,), time_limit=1.0, progress=False)
    stop()
    known = [row["model"] for row in part["tables"][0]["rows"]]
    missing = part["missing"]["0"]
    assert known + missing == ["base", "a", "b", "mean", "both"] and missing
    assert len(known) == rows
    assert read_json(tmp_path / "result.json") == part
    assert f"not there yet, seed 0: {'; '.join(missing)}" in (tmp_path / "table.md").read_text()
    assert any("state" in name for name in files(tmp_path)) == training
    run_table(experiment, tmp_path, seeds=(0, 1), progress=False)
    assert files(tmp_path) == files(whole)


def test_a_call_without_time_shows_all_that_is_stored(
    files: ReadFiles, small: str, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "seed-1" / "a.reports.safetensors").unlink()
    experiment = Two.on(small, **TINY)
    result = run_table(experiment, tmp_path / "copy", seeds=(0, 1), time_limit=0.0, progress=False)
    assert result["missing"] == {"1": ["a"]}
    shown = [[row["model"] for row in table["rows"]] for table in result["tables"]]
    part = ["base", "b", "mean", "both"]
    assert shown == [["base", "a", "b", "mean", "both"], part, part]
    run_table(experiment, tmp_path / "copy", seeds=(0, 1), progress=False)
    assert files(tmp_path / "copy") == files(whole)


def test_fresh_encoders_are_those_of_their_seed(small: str, tmp_path: Path) -> None:
    data = fk.load(small)

    def first_item(seed: int, offset: int) -> list[float]:
        model = ArtifactCache(data, tmp_path, seed, None, None, 10, False).fresh(
            fk.SASRec, offset=offset, max_len=4, dim=2
        )
        torch.rand(1)  # what was drawn before does not matter
        return model.item_embedding.weight[1].tolist()

    assert first_item(1, 2) == first_item(1, 2) == first_item(0, 3)
    assert len({tuple(first_item(*pair)) for pair in ((0, 0), (1, 0), (0, 2))}) == 3


def report_of(values: Sequence[float]) -> fk.Report:
    """A report with these NDCG@10, and HR@10 one."""
    array = np.array(values)
    protocol = Protocol("test", "full", "exclude", 0, "data")
    per_user = {"ndcg@10": array, "hr@10": np.ones(len(array))}
    return fk.Report(per_user, np.arange(len(array)), np.ones(len(array), np.int64), protocol)


def test_rows_and_table_to_the_letter() -> None:
    """Four users. a is best on validation though not on test; the ensemble gains .2 on each."""
    reports = {
        "base": (report_of([0.0] * 4), report_of([0.1, 0.1, 0.2, 0.2])),
        "a": (report_of([0.5] * 4), report_of([0.2, 0.2, 0.2, 0.2])),
        "b": (report_of([0.4] * 4), report_of([0.3, 0.3, 0.2, 0.28])),
        "all": (report_of([0.4] * 4), report_of([0.4, 0.4, 0.4, 0.4])),
    }
    references = {"best member": ["a", "b"], "control": ["late"]}
    rows = comparison_rows(reports, references, "all")
    assert [row["chosen"] for row in rows] == [False, True, False, False]
    assert [row["over"]["control"] for row in rows] == [None] * 4
    shares = [row["share_of_ensemble_gain"] for row in rows]
    assert shares == pytest.approx([-0.25, 0, 0.35, 1])
    assert comparison_table(rows, list(references), {"b": ".5"}).splitlines() == [
        "| model | NDCG@10 | HR@10 | validation NDCG@10 | over best member | over control"
        " | share of the ensemble's gain | paper |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        "| base | 0.1500 | 1.0000 | 0.0000 | -0.0500 ± 0.0566 |  | -25 % |  |",
        "| a (best member) | 0.2000 | 1.0000 | 0.5000 |  |  |  |  |",
        "| b | 0.2700 | 1.0000 | 0.4000 | +0.0700 ± 0.0467 |  | 35 % | .5 |",
        "| all | 0.4000 | 1.0000 | 0.4000 | +0.2000 ± 0.0000 |  | 100 % |  |",
    ]
    part = {name: reports[name] for name in ("base", "a", "all")}
    rows = comparison_rows(part, references, "all")
    assert all(row["over"]["best member"] is None and not row["chosen"] for row in rows)


def test_no_share_of_a_gain_that_may_be_none() -> None:
    reports = {
        "a": (report_of([0.5] * 4), report_of([0.2, 0.2, 0.2, 0.2])),
        "all": (report_of([0.5] * 4), report_of([0.1, 0.9, 0.1, 0.2])),
    }
    rows = comparison_rows(reports, {"a": ["a"]}, "all")
    assert rows[1]["over"]["a"]["mean"] > 0 > rows[1]["over"]["a"]["low"]
    assert [row["share_of_ensemble_gain"] for row in rows] == [None, None]
    assert "share" not in comparison_table(rows, ["a"], {})


def test_reports_come_back_as_they_were(small: str, tmp_path: Path) -> None:
    model, data = fk.SASRec(40, max_len=8, dim=8), fk.load(small)
    reports = {
        "a": fk.evaluate(model, data, k=(3, 10), users=[5, 2, 7]),
        "b": fk.evaluate(model, data, split="validation", candidates="full", seen="keep"),
    }
    save_reports(tmp_path / "x.safetensors", reports)
    for name, found in load_reports(tmp_path / "x.safetensors").items():
        assert found.protocol == reports[name].protocol and dict(found) == dict(reports[name])
        for field in ("users", "ranks"):
            np.testing.assert_array_equal(getattr(found, field), getattr(reports[name], field))
        for metric, values in reports[name].per_user.items():
            np.testing.assert_array_equal(found.per_user[metric], values)


def test_a_base_from_a_file(small: str, whole: Path, tmp_path: Path) -> None:
    """Its rows are those of the run that trained it, and its sizes are in the settings."""
    base, settings = whole / "seed-0" / "base.safetensors", {**TINY, "dim": 64}
    result = run_table(Two.on(small, base=str(base), **settings), tmp_path, progress=False)
    expected = read_json(whole / "result.json")["tables"][0]["rows"]
    found = result["tables"][0]["rows"]
    assert [{**row, "about": None} for row in found] == [{**row, "about": None} for row in expected]
    assert result["settings"]["dim"] == 8 and result["settings"]["base"].startswith("BERT4Rec ")
    other = fk.BERT4Rec(3, max_len=8, dim=8)
    other.item_ids = list("abc")
    fk.save_model(other, tmp_path / "other.safetensors")
    with pytest.raises(fk.InputError, match="base: the catalogue of .*other.safetensors is not"):
        run_table(Two.on(small, base=str(tmp_path / "other.safetensors")), tmp_path / "x")
