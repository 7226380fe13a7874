"""All experiments on small data: their rows, what their settings do, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fisherkern as fk
from benchmarks.experiments import EXPERIMENTS, TABLES, artifacts, run_table
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.pruning import without_cheapest
from fisherkern.files import read_json
from fisherkern.fingerprint import fingerprint

TINY: dict[str, Any] = {"max_len": 8, "dim": 8, "batch_size": 32, "validation_users": 20}
FIGURES = ("--cost-sequences", "8", "--plane-users", "5")


# gBCE of the ablation draws more negatives than there are items; its rows are tried below.
@pytest.mark.parametrize("name", [name for name in TABLES if name != "ablation"])
def test_every_table_on_small_data(
    small: str, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "merge": ["--base-epochs", "1", "--member-epochs", "1", *FIGURES],
        "objectives": ["--epochs", "2"],
        "table1": ["--member-epochs", "1", "--shared-start"],
        "table2": ["--base-epochs", "1", "--member-epochs", "1"],
        "samplers": ["--base-epochs", "1", "--member-epochs", "1", "--extra-epochs", "0"],
        "splits": ["--base-epochs", "1", "--member-epochs", "1", "--by", "regions"],
        "free-fisher": ["--base-epochs", "1", "--member-epochs", "1"],
        "environments": ["--base-epochs", "1", "--member-epochs", "1"],
        "pruning": ["--base-epochs", "1"],
        "checkpoints": ["--epochs", "5", "--count", "2"],
        "branches": [
            *("--member-epochs", "1", "--count", "2", "--encoder", "SASRec", "--turn-steps", "3")
        ],
        "emkd": ["--base-epochs", "1", "--member-epochs", "1", "--networks", "2"],
        "pcrec": ["--peer-epochs", "2"],
    }[name]
    given = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    command = [name, "--data", small, "--out", str(tmp_path), "--quiet", *given]
    assert main([*command, *settings]) == 0
    result = read_json(tmp_path / "result.json")
    names = [row["model"] for row in result["tables"][0]["rows"]]
    assert result["missing"] == {} and result["settings"]["experiment"] == name
    assert len(list((tmp_path / "seed-0").glob("*.reports.safetensors"))) == len(names)
    aligned_by_loss = "uniform merge, aligned by the loss" in names
    assert aligned_by_loss == (name in ("table1", "table2", "branches"))
    for row in result["tables"][0]["rows"]:
        assert all(cell is not None for cell in row["over"].values())
    printed = capsys.readouterr().out
    assert printed.startswith((tmp_path / "table.md").read_text().rstrip())
    assert main([*command, *settings, "--lr", "0.5"]) == 2
    assert "other settings (lr)" in capsys.readouterr().err


def test_the_ranking_of_emkd_is_that_of_its_code_on_the_data() -> None:
    """Its input has 40 places on ML-1M and 15 on Beauty."""
    title = "NDCG@10 by the paper's ranking"
    for name, seen, figure in (("ml-1m", "last-39", ".1915"), ("beauty", "last-14", ".0594")):
        experiment = TABLES["emkd"].on(name)
        assert experiment.rankings() == {title: seen}
        assert list(experiment.paper()[0].values()) == [figure]
    assert TABLES["emkd"].on("x.txt").rankings() == {}


@pytest.fixture
def schedules(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The schedule of every model that is trained, by name."""
    seen: dict[str, str] = {}
    plain = ArtifactCache.train

    def noted(self: ArtifactCache, name: str, *given: Any, **settings: Any) -> fk.SequenceEncoder:
        seen[name] = settings.get("schedule", "constant")
        return plain(self, name, *given, **settings)

    monkeypatch.setattr(ArtifactCache, "train", noted)
    return seen


def test_a_constant_rate_is_of_members_and_control_alone(
    small: str, tmp_path: Path, schedules: dict[str, str]
) -> None:
    """The extra epochs decay as ever."""
    given = {**TINY, "base_epochs": 1, "member_epochs": 1}
    experiment = TABLES["table2"].on(small, schedule="constant", **given)
    run_table(experiment, tmp_path, progress=False)
    more = {name for name in schedules if name.endswith("once more")}
    assert {schedules[name] for name in more} == {"linear"}
    assert {schedules[name] for name in schedules.keys() - more} == {"constant"}
    assert {"+ CL4SRec", "masked items, as many passes as all members"} <= schedules.keys()


def test_branches_may_keep_their_rate(
    small: str, tmp_path: Path, schedules: dict[str, str]
) -> None:
    for schedule in ("linear", "constant"):
        experiment = TABLES["branches"].on(small, schedule=schedule, count=2, **TINY)
        own = ArtifactCache(fk.load(small), tmp_path / schedule, 0, None, None, 10, False)
        experiment = dataclasses.replace(experiment, member_epochs=1)
        experiment.rows(own)["member 2"]()
        assert schedules.pop("member 2") == schedule


@pytest.mark.parametrize("encoder", ["BERT4Rec", "SASRec"])
def test_branches_from_scratch_start_apart_or_together(
    small: str, tmp_path: Path, encoder: str
) -> None:
    own = ArtifactCache(fk.load(small), tmp_path, 0, None, None, 10, False)
    for shared in (False, True):
        given = {"encoder": encoder, "shared_start": shared, "max_len": 8, "dim": 8}
        experiment = TABLES["branches"].on(small, **given)
        starts = {fingerprint(experiment.start(own, number)) for number in (1, 2, 3)}
        assert len(starts) == (1 if shared else 3)


def test_parts_of_other_sizes(small: str, tmp_path: Path) -> None:
    """Each has a third of the users of the one before; the larger ones count for more."""
    data = fk.load(small)
    experiment = TABLES["splits"].on(small, parts=3, size_ratio=1 / 3)
    parts = experiment.member_data(data, 0).values()
    sizes = np.array([part.num_users for part in parts])
    # Users of fewer than two training actions are in no part; here there is none.
    assert sizes.sum() == data.num_users
    np.testing.assert_allclose(sizes, data.num_users * np.array([9, 3, 1]) / 13, atol=1)
    assert len({user for part in parts for user in part.user_ids}) == data.num_users
    given = ["--base-epochs=1", "--member-epochs=1", "--parts=3", "--size-ratio=0.25", "--quiet"]
    given += [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    assert main(["splits", "--data", small, "--out", str(tmp_path), *given]) == 0
    rows = {row["model"]: row for row in read_json(tmp_path / "result.json")["tables"][0]["rows"]}
    parts = TABLES["splits"].on(small, parts=3, size_ratio=0.25).member_data(data, 0).values()
    sizes = np.array([part.num_users for part in parts])
    for name in ("weighted by users", "Fisher merge weighted by users, floor 0.1"):
        found = np.array(rows[name]["about"]["weights"])
        np.testing.assert_allclose(found / found.sum(), sizes / sizes.sum())
        assert rows[name]["over"].keys() >= {"weighted by users"}


def test_presets_give_way_to_what_is_given() -> None:
    assert TABLES["table2"].on("beauty").max_len == 20
    assert TABLES["table2"].on("folder/beauty.txt", max_len=30).max_len == 30
    assert TABLES["table2"].on("ml-1m").max_len == 50


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_help_explains_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(EXPERIMENTS[name]):
        assert f"--{field.name.replace('_', '-')} " in printed
    assert "--max-len int length of a history (default: 50)" in printed


def test_ctrl_c_ends_with_130(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "train", interrupt)
    assert main(["splits", "--data", small, "--out", str(tmp_path), "--quiet"]) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from what is stored\n"


def test_a_folder_that_cannot_be_written(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    for out in (tmp_path / "file", tmp_path / "file" / "in" / "it"):
        assert main(["splits", "--data", small, "--out", str(out)]) == 2
        message = f"experiments splits: {out}: no folder can be written there\n"
        assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table2", "--threads", "0"], "--threads: must be at least 1, got 0"),
        (["table3"], "invalid choice: 'table3'"),
        (["table2", "--by", "time"], "unrecognized arguments: --by time"),
        (["merge", "--members", "both"], "members: 'both' is not one of shards, seeds, masking"),
        (["table2", "--members", "seeds"], "unrecognized arguments: --members seeds"),
        (["table2", "--seeds", "0"], "--seeds: must be at least 1, got 0"),
        (["table2", "--time-limit", "-1"], "time_limit: must not be negative, got -1"),
        (["table2", "--validation-users", "0"], "validation_users: must be at least 1, got 0"),
        (["objectives", "--validations", "0"], "validations: must be at least 1, got 0"),
        (["splits", "--by", "sex"], "by: 'sex' is not one of users, time, regions, seeds"),
        (["splits", "--parts", "1"], "parts: must be at least 2, got 1"),
        (["splits", "--shared", "0"], "shared: must be in (0, 1], got 0"),
        (["splits", "--size-ratio", "2"], "size_ratio: must be in (0, 1], got 2"),
        (["splits", "--by", "time", "--size-ratio", "0.5"], "size_ratio: parts by time have"),
        (["branches", "--count", "1"], "count: must be at least 2, got 1"),
        (["branches", "--encoder", "Caser"], "encoder: 'Caser' is not one of BERT4Rec, SASRec"),
        (["pcrec", "--encoder", "Caser"], "encoder: 'Caser' is not one of BERT4Rec, FISM, YouTub"),
        (["branches", "--base", "x", "--base-epochs", "1"], "base: a model to start from needs no"),
        (["branches", "--shared-start", "--base-epochs", "1"], "shared_start: members that branch"),
        (["objectives", "--base", "x"], "base: every row of objectives starts from scratch"),
        (["table2", "--schedule", "cosine"], "schedule: must be 'constant' or 'linear', got"),
        (["table2", "--base", "none.safetensors"], "none.safetensors: no such file"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, assert_refused: Callable[[list[str], str], None]
) -> None:
    assert_refused(arguments, message)


def test_pruning_takes_the_weights_of_least_cost() -> None:
    """Against a loop over all weights."""
    torch.manual_seed(0)
    model = fk.SASRec(7, max_len=3, dim=2, layers=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    fisher = {name: torch.rand_like(weight) for name, weight in model.named_parameters()}
    costs = sorted(
        (float(fisher[name].flatten()[i] * weight.flatten()[i] ** 2), name, i)
        for name, weight in model.named_parameters()
        for i in range(weight.numel())
    )
    count = round(0.3 * len(costs))
    left = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for _, name, i in costs[:count]:
        left[name].view(-1)[i] = 0
    pruned = dict(without_cheapest(model, fisher, 0.3).named_parameters())
    assert all(torch.equal(pruned[name], weight) for name, weight in left.items())


@pytest.mark.parametrize("encoder", ["FISM", "YouTubeDNN"])
def test_pcrec_takes_two_bases_of_its_paper(small: str, tmp_path: Path, encoder: str) -> None:
    given = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    command = ["pcrec", "--data", small, "--out", str(tmp_path), "--quiet", *given]
    assert main([*command, "--peer-epochs", "2", "--encoder", encoder]) == 0
    stored = fk.load_model(next((tmp_path / "seed-0").glob("*parameter-wise*.safetensors")))
    assert type(stored).__name__ == encoder and stored.config["dropout"] == 0.1


def test_rows_may_be_made_by_several_calls(
    small: str, tmp_path: Path, files: Callable[[Path], dict[str, bytes]]
) -> None:
    """One call's rows and then another's give the files of one call for both."""
    command = ["ablation", "--data", small, "--quiet", "--epochs", "2", "--dim", "8"]
    command += ["--max-len", "6", "--validation-users", "9", "--batch-size", "32", "--rows"]
    for rows in (["reference"], ["3 layers"]):
        assert main([*command, *rows, "--out", str(tmp_path / "two")]) == 0
    assert main([*command, "reference", "3 layers", "--out", str(tmp_path / "one")]) == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
    result = read_json(tmp_path / "one" / "result.json")
    rows = [row["model"] for row in result["tables"][0]["rows"]]
    assert rows == ["reference", "3 layers"]
    assert "dropout .4" in result["missing"]["0"]


def test_a_row_that_changes_nothing_is_left_out(small: str, tmp_path: Path) -> None:
    own = ArtifactCache(fk.load(small), tmp_path, 0, None, None, 10, False)
    rows = TABLES["ablation"].on(small, dim=128, dropout=0.4).rows(own)
    assert "reference" in rows and "D = 64" in rows
    assert "D = 128" not in rows and "dropout .4" not in rows


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rows", "another"], "--rows: no row 'another'"),
        (["--device", "gpu"], "--device: 'gpu' is not like cpu, cuda or cuda:1"),
        (["--device", "cuda:99"], "--device: cuda:99 is not here"),
    ],
)
def test_other_rows_and_devices_are_refused(
    assert_refused: Callable[[list[str], str], None], given: list[str], message: str
) -> None:
    assert_refused(["ablation", *given], message)


def test_branches_of_a_base_keep_checkpoints_of_their_own(small: str, tmp_path: Path) -> None:
    given = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    command = ["checkpoints", "--data", small, "--out", str(tmp_path), "--quiet", *given]
    branches = ["--branches", "2", "--base-epochs", "2", "--epochs", "5", "--count", "2"]
    assert main([*command, "--branches", "2"]) == 2
    assert main([*command, "--base-epochs", "2"]) == 2
    assert main([*command, *branches]) == 0
    folder = tmp_path / "seed-0"
    merged = fk.load_model(folder / "all-checkpoints-merged.safetensors")
    kept = [
        fk.load_model(folder / f"checkpoints-{branch}" / f"checkpoint-{epoch:04}.safetensors")
        for branch in (1, 2)
        for epoch in (2, 4)
    ]
    tables = torch.stack([model.item_embedding.weight for model in kept])
    assert not torch.equal(tables[0], tables[2])
    assert torch.allclose(merged.item_embedding.weight, tables.mean(0), atol=1e-6)
