"""Tables made in pieces: the same bytes again, what a short call leaves, cells as by compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import fisherkern as fk
from fisherkern.data import write_seqrec
from fisherkern.experiments import Experiment, lab, run_table
from fisherkern.experiments.engine import Rows
from fisherkern.experiments.lab import Lab
from fisherkern.files import read_json

TINY: dict[str, Any] = {"max_len": 8, "dim": 8, "batch_size": 32, "validation_users": 20}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "small.txt"
    write_seqrec(fk.synthetic(60, 40, clusters=8), path)
    return str(path)


@dataclasses.dataclass(frozen=True)
class Two(Experiment):
    """Two models from one base, and their mean."""

    ENSEMBLE: ClassVar = "both"

    def references(self) -> dict[str, Sequence[str]]:
        return {"best": ["a", "b"], "base": ["base"]}

    def rows(self, lab: Lab) -> Rows:
        base = partial(self.common_base, lab, fk.MaskedItems(), 3)

        def tuned(name: str, seed: int) -> fk.BERT4Rec:
            return lab.train(name, base, fk.MaskedItems(), epochs=2, seed=seed, **self.training())

        a, b = partial(tuned, "a", 1), partial(tuned, "b", 2)
        return {
            "base": base,
            "a": a,
            "b": b,
            "mean": lambda: lab.merged("mean", [a(), b()], method="uniform"),
            "both": lambda: fk.ScoreEnsemble([a(), b()]),
        }


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
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
        gain = test["both"]["ndcg@10"] - test[best]["ndcg@10"]
        assert [row["model"] for row in table["rows"]] == list(models)
        for row in table["rows"]:
            name = row["model"]
            assert {metric: row[metric] for metric in test[name]} == dict(test[name])
            assert row["validation_ndcg@10"] == validation[name]["ndcg@10"]
            for title, reference in (("best", best), ("base", "base")):
                expected = fk.compare(test[name], test[reference])["ndcg@10"]
                cell = {"model": reference, **dataclasses.asdict(expected)}
                assert row["over"][title] == cell
            share = (test[name]["ndcg@10"] - test[best]["ndcg@10"]) / gain if gain > 0 else None
            assert row["share_of_ensemble_gain"] == pytest.approx(share)
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
    small: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(whole)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    for name in ("train", "merge", "evaluate", "diag_fisher"):
        monkeypatch.setattr(lab, name, never)
    run_table(Two.on(small, **TINY), whole, seeds=(0, 1), progress=False)
    assert files(whole) == before
    assert not any("state" in name for name in before)


def stop_after(monkeypatch: pytest.MonkeyPatch, looks: int) -> Callable[[], None]:
    """A clock whose hour comes after `looks` looks at it; the returned function stops it."""
    seen = iter(range(looks + 1))
    monkeypatch.setattr(lab.time, "monotonic", lambda: 0.0 if next(seen, None) is not None else 1e9)
    return monkeypatch.undo


@pytest.mark.parametrize(
    ("looks", "rows", "training"),
    [(0, 0, False), (5, 0, True), (8, 1, False), (11, 1, True), (12, 1, False), (14, 2, False)],
)
def test_what_a_short_call_leaves_is_a_table_that_goes_on(
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
