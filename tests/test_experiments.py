"""The three teams' story on a catalogue small enough for a test: content, resume, refusal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import fisherkern as fk
from fisherkern.data import write_seqrec
from fisherkern.experiments import Story, run
from fisherkern.experiments.fisher_cost import best_scaled_error, relative_error
from fisherkern.experiments.plane import plane_of
from fisherkern.files import read_json


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    path = tmp_path_factory.mktemp("data") / "small.txt"
    write_seqrec(fk.synthetic(90, 40, clusters=8), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fisherkern.experiments.plane.GRID", 3)
        yield Story(
            data=str(path),
            base_epochs=2,
            branch_epochs=1,
            batch_size=32,
            max_len=8,
            dim=8,
            cost_sequences=16,
            search_users=20,
            plane_users=20,
        )


@pytest.mark.parametrize("members", ["shards", "seeds", "masking"])
def test_story(story: Story, members: str, tmp_path: Path) -> None:
    result = run(dataclasses.replace(story, members=members), tmp_path, progress=False)
    assert read_json(tmp_path / "result.json") == result
    rows = {row["model"]: row for row in result["rows"]}
    assert sum(row["best_member"] for row in result["rows"]) == 1
    data = fk.load(story.data)
    merged = fk.load_model(tmp_path / "merged.safetensors")
    again = fk.evaluate(merged, data)["ndcg@10"]
    assert rows[result["merged"]]["ndcg@10"] == again
    ensemble = rows["score ensemble"]
    if ensemble["share_of_ensemble_gain"] is not None:
        assert ensemble["share_of_ensemble_gain"] == pytest.approx(1)
    for picture in ("fisher_cost", "sorted_probabilities", "plane"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000
    assert "± is 1.96 standard errors" in (tmp_path / "table.md").read_text()
    shares = [fk.DiagFisher.load(tmp_path / f"member-{m}.fisher.safetensors") for m in (1, 2, 3)]
    users = sum(fisher.meta["num_sequences"] for fisher in shares)
    assert users == (90 if members == "shards" else 270)


def test_interrupted_story_goes_on_to_the_same_result(story: Story, tmp_path: Path) -> None:
    whole = run(story, tmp_path / "whole", progress=False)
    run(story, tmp_path / "parts", progress=False)
    for name in ("result.json", "fisher-merge.safetensors", "member-2.safetensors"):
        (tmp_path / "parts" / name).unlink()
    parts = run(story, tmp_path / "parts", progress=False)
    assert parts["rows"] == whole["rows"]
    for name in ("member-2", "fisher-merge"):
        a, b = (tmp_path / folder / f"{name}.safetensors" for folder in ("whole", "parts"))
        assert a.read_bytes() == b.read_bytes()


def test_folder_of_another_run_is_refused(story: Story, tmp_path: Path) -> None:
    run(story, tmp_path, progress=False)
    with pytest.raises(fk.InputError, match=r"config.json: holds a run .*\(floor, seed\)"):
        run(dataclasses.replace(story, seed=1, floor=0.5), tmp_path, progress=False)
    with pytest.raises(fk.InputError, match="members: 'both'"):
        dataclasses.replace(story, members="both")


def test_errors_against_the_exact_fisher() -> None:
    exact = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    double = {name: 2 * value for name, value in exact.items()}
    assert relative_error(double, exact) == pytest.approx(1)
    assert best_scaled_error(double, exact) == pytest.approx(0, abs=1e-7)
    across = {"a": torch.tensor([0.0, 5.0]), "b": torch.tensor([0.0])}
    assert best_scaled_error(across, exact) == pytest.approx(1)


def test_plane_holds_its_members() -> None:
    """Three linear models at known distances; the score is what is asked for at each point."""
    members = []
    for weights in ([0.0, 0.0], [3.0, 0.0], [0.0, 4.0]):
        model = torch.nn.Linear(2, 1, bias=False)
        model.weight.data[:] = torch.tensor(weights)
        members.append(model)
    named = {f"member {number}": member for number, member in enumerate(members, start=1)}
    plane = plane_of(named, {"mean": members[0]}, lambda m: float(m.weight.detach().sum()))
    assert plane["points"]["member 2"] == pytest.approx([3, 0])
    assert plane["points"]["member 3"] == pytest.approx([0, 4])
    expected = np.array(plane["x"])[None, :] + np.array(plane["y"])[:, None]
    np.testing.assert_allclose(plane["values"], expected, atol=1e-5)
