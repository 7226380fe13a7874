"""Three branches of a base merged, small: rows as by evaluate, figures, resume, seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fisherkern as fk
from benchmarks.experiments import ShardMerge, artifacts, run_table
from fisherkern.files import read_json

FIGURES = ("fisher_cost", "sorted-probabilities", "plane")
TIMINGS = ("fisher_cost.png", "fisher_cost.md", "seed-0/figures.fisher_cost.json")


@pytest.fixture(scope="module")
def experiment(make_data: Callable[[int, int], str]) -> Iterator[ShardMerge]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.experiments.figures.GRID_SIZE", 3)
        yield ShardMerge(
            data=make_data(90, 40),
            base_epochs=2,
            member_epochs=1,
            batch_size=16,
            lr=0.02,
            warmup_steps=1,
            max_len=8,
            dim=8,
            cost_sequences=16,
            validation_users=20,
            plane_users=20,
        )


@pytest.mark.parametrize("members", ["shards", "seeds", "masking"])
def test_rows_are_of_evaluate(experiment: ShardMerge, members: str, tmp_path: Path) -> None:
    experiment = dataclasses.replace(experiment, members=members)
    result = run_table(experiment, tmp_path, progress=False)
    assert read_json(tmp_path / "result.json") == result
    rows = {row["model"]: row for row in result["tables"][0]["rows"]}
    assert sum(row["chosen"] for row in rows.values()) == 1
    data, folder = fk.load(experiment.data), tmp_path / "seed-0"
    models = [fk.load_model(folder / f"member-{m}.safetensors") for m in (1, 2, 3)]
    fishers = [
        fk.DiagFisher.load(folder / f"member-{m}-exact.fisher.safetensors") for m in (1, 2, 3)
    ]
    users = sum(fisher.meta["num_sequences"] for fisher in fishers)
    assert users == (90 if members == "shards" else 270)
    merged = fk.merge(models, method="fisher", fishers=fishers, floor=experiment.floor)
    assert rows["fisher merge"]["ndcg@10"] == fk.evaluate(merged, data)["ndcg@10"]
    assert rows["fisher merge"]["ndcg@10"] != rows["uniform merge"]["ndcg@10"]
    assert rows["fisher merge, floor 1"]["about"]["weights"] == pytest.approx([1 / 3] * 3)
    assert rows["member 1"]["about"]["epochs"] == 1
    epochs = 1 if members == "shards" else 3
    assert rows["all users, same compute"]["about"]["epochs"] == epochs
    for figure in FIGURES:
        assert (tmp_path / f"{figure}.png").stat().st_size > 1000
    plane = read_json(folder / "figures.plane.json")
    assert list(plane["points"]) == [
        *("member 1", "member 2", "member 3", "base", "uniform merge", "fisher merge")
    ]
    assert "± is 1.96 standard errors" in (tmp_path / "table.md").read_text()


@pytest.fixture(scope="module")
def whole(experiment: ShardMerge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run_table(experiment, out, progress=False)
    return out


# In a training, and between the first figure and the second.
@pytest.mark.parametrize(("looks", "rows", "missing"), [(6, 1, FIGURES), (44, 10, FIGURES[1:])])
def test_a_short_call_goes_on_to_the_same_files(
    files: Callable[[Path], dict[str, bytes]],
    experiment: ShardMerge,
    whole: Path,
    looks: int,
    rows: int,
    missing: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        seen = iter(range(looks + 1))
        patch.setattr(artifacts.time, "monotonic", lambda: 0.0 if next(seen, -1) >= 0 else 1e9)
        part = run_table(experiment, tmp_path, time_limit=1.0, progress=False)
    assert read_json(tmp_path / "result.json") == part
    assert len(part["tables"][0]["rows"]) == rows
    assert part["missing"]["pictures"] == list(missing)
    text = (tmp_path / "table.md").read_text()
    assert f"not there yet, pictures: {'; '.join(missing)}" in text
    assert run_table(experiment, tmp_path, progress=False)["missing"] == {}
    found, expected = files(tmp_path), files(whole)
    assert found.keys() == expected.keys()
    assert [n for n in expected if found[n] != expected[n] and n not in TIMINGS] == []


def test_the_figures_are_of_the_first_seed(experiment: ShardMerge, tmp_path: Path) -> None:
    result = run_table(experiment, tmp_path, seeds=(0, 1), progress=False)
    assert [table["seed"] for table in result["tables"]] == [0, 1, "mean"]
    assert len(list((tmp_path / "seed-0").glob("figures.*"))) == 3
    assert not list((tmp_path / "seed-1").glob("figures.*"))
    first, other = (table["rows"][1]["ndcg@10"] for table in result["tables"][:2])
    assert first != other


def test_other_settings_are_refused(experiment: ShardMerge, tmp_path: Path) -> None:
    run_table(experiment, tmp_path, time_limit=0.0, progress=False)
    other = dataclasses.replace(experiment, floor=0.5, plane_users=7)
    with pytest.raises(fk.InputError, match=r"config.json: holds a run .*\(floor, plane_users\)"):
        run_table(other, tmp_path, progress=False)
    with pytest.raises(fk.InputError, match="members: 'both'"):
        dataclasses.replace(experiment, members="both")
