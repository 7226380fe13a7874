"""The Fisher paper's evaluation, small: trained once and equally, compared with its like."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fisherkern as fk
from benchmarks.experiments import Paper, artifacts, figures, paper, run_paper
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.contrastive import CONTROL, EXTRA, MEMBERS
from benchmarks.experiments.reports import load_reports
from fisherkern.data import write_seqrec
from fisherkern.files import read_json
from fisherkern.fingerprint import fingerprint

TINY: dict[str, Any] = {
    "max_len": 8,
    "dim": 8,
    "layers": 1,
    "batch_size": 32,
    "validation_users": 20,
    "base_epochs": 3,
    "member_epochs": 1,
    "scratch_epochs": 3,
    "extra_epochs": 2,
    "fisher_sequences": 20,
    "cost_sequences": 8,
}
ReadFiles = Callable[[Path], dict[str, bytes]]

TIMINGS = ("fisher_cost.png", "fisher_cost.md", "table2/seed-0/figures.fisher_cost.json")


@pytest.fixture(scope="module", autouse=True)
def fewer() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.experiments.figures.GRID_SIZE", 2)
        patch.setattr("benchmarks.experiments.samplers.ITEMS", (2,))
        patch.setattr("benchmarks.experiments.samplers.SAMPLERS", ("topk", "model"))
        patch.setattr("benchmarks.experiments.fisher_cost.LINES", (("topk", "sequence", (2,)),))
        yield


@pytest.fixture(scope="module")
def small(make_data: Callable[[int, int], str]) -> str:
    return make_data(50, 180)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A training as it began."""

    name: str  # table1/seed-0/masked-items
    start: str
    objective: str
    settings: dict[str, Any]


@pytest.fixture(scope="module")
def trained() -> list[Trained]:
    return []


@pytest.fixture(scope="module")
def whole(small: str, trained: list[Trained], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, train = tmp_path_factory.mktemp("whole"), artifacts.train

    def noted(model: Any, data: Any, *, objective: Any, state: Path, **how: Any) -> Any:
        name = str(state.relative_to(out)).removesuffix(".state.safetensors")
        trained.append(Trained(name, fingerprint(model), repr(objective), how))
        return train(model, data, objective=objective, state=state, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "train", noted)
        run_paper(Paper.on(small, **TINY), out, progress=False)
    return out


def rows_of(out: Path, part: str) -> dict[str, dict[str, Any]]:
    result = read_json(out / "result.json")["parts"][part]
    return {row["model"]: row for row in result["tables"][0]["rows"]}


def artifact_name(row: str) -> str:
    return ArtifactCache.artifact_name(type("Seed0", (), {"seed": 0}), row)  # type: ignore[arg-type]


def model_of(out: Path, row: str, table: str = "table2") -> Any:
    return fk.load_model(out / table / f"{artifact_name(row)}.safetensors")


def test_everything_is_there(whole: Path) -> None:
    result = read_json(whole / "result.json")
    assert result["missing"] == {}
    text = (whole / "paper.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings[:-2] == [f"## {heading}" for heading in paper.HEADINGS.values()]
    for part in paper.HEADINGS:
        assert read_json(whole / part / "result.json") == result["parts"][part]
        table = (whole / part / "table.md").read_text()
        assert table.split("\n\n")[2].strip() in text
    pictures = sorted(path.name for path in whole.glob("*.png"))
    assert pictures == [
        "fisher_cost.png",
        "plane-table1.png",
        "plane-table2.png",
        "sorted-probabilities-table1.png",
        "sorted-probabilities-table2.png",
    ]
    assert all(f"]({name})" in text for name in pictures)
    assert "seconds" in (whole / "fisher_cost.md").read_text()
    plane = read_json(whole / "table2" / "seed-0" / "figures.plane.json")
    assert list(plane["points"]) == [
        *MEMBERS[:2],
        MEMBERS[3],
        "base",
        "uniform merge",
        "Fisher merge",
    ]


def test_a_second_call_makes_nothing(
    files: ReadFiles, small: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(whole)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    for name in ("train", "merge", "evaluate", "diag_fisher"):
        monkeypatch.setattr(artifacts, name, never)
    for name in ("fisher_cost", "weight_plane", "sorted_probabilities"):
        monkeypatch.setattr(figures, name, never)
    run_paper(Paper.on(small, **TINY), whole, progress=False)
    assert files(whole) == before


@pytest.mark.slow
def test_pieces_give_the_same_bytes(
    files: ReadFiles,
    small: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calls whose time is up after so many looks at the clock: in trainings, Fishers, pictures."""
    settings, missing = Paper.on(small, **TINY), []
    for looks in (4, 40, 150, 190):
        with monkeypatch.context() as patch:
            seen = iter(range(looks + 1))
            patch.setattr(
                artifacts.time, "monotonic", lambda seen=seen: 0.0 if next(seen, -1) >= 0 else 1e9
            )
            result = run_paper(settings, tmp_path, time_limit=1.0, progress=False)
        assert read_json(tmp_path / "result.json") == result
        assert "not there yet, seed 0" in (tmp_path / "paper.md").read_text()
        if looks == 4:  # in the middle of a training
            assert [path.name for path in tmp_path.rglob("*.state.*")] == ["base.state.safetensors"]
        missing.append(sum(len(names) for own in result["missing"].values() for names in own))
    assert missing == sorted(missing, reverse=True) and missing[-1] > 0
    assert run_paper(settings, tmp_path, progress=False)["missing"] == {}
    found, expected = files(tmp_path), files(whole)
    assert found.keys() == expected.keys()
    assert [n for n in expected if found[n] != expected[n] and n not in TIMINGS] == []


def test_every_model_is_trained_once(whole: Path, trained: list[Trained]) -> None:
    names = [run.name for run in trained]
    assert len(set(names)) == len(names)
    first = [*MEMBERS, CONTROL]
    expected = {f"table1/{artifact_name(row)}" for row in first}
    expected |= {f"table2/{artifact_name(row)}" for row in ("base", *first)}
    assert {name for name in names if not name.endswith(artifact_name(EXTRA)[7:])} == expected
    epochs = {run.name: run.settings["epochs"] for run in trained}
    for table, rows in (("table1", first), ("table2", ["base", *first])):
        found = [epochs[f"{table}/{artifact_name(row)}"] for row in rows]
        assert found == ([3, 3, 3, 3, 12] if table == "table1" else [3, 1, 1, 1, 1, 4])


def test_every_row_gets_the_same_extra_epochs(whole: Path, trained: list[Trained]) -> None:
    runs = {run.name: run for run in trained}
    for part, folder in (("table1", "table1"), ("table2", "table2"), ("samplers", "table2")):
        rows = rows_of(whole, part)
        plain = [row for row in rows if not row.endswith(EXTRA)]
        assert {f"{row}{EXTRA}" for row in plain} == rows.keys() - set(plain)
        found = set()
        for row in plain:
            if row == "score ensemble":
                continue
            run = runs[f"{folder}/{artifact_name(row + EXTRA)}"]
            assert run.start == fingerprint(model_of(whole, row, folder)), row
            how = {name: value for name, value in run.settings.items() if name != "progress"}
            found.add((run.objective, *sorted(how.items())))
            assert rows[f"{row}{EXTRA}"]["about"]["epochs"] == 2
        assert len(found) == 1 and "MaskedItems" in next(iter(found))[0]
    members = [model_of(whole, f"{name}{EXTRA}") for name in MEMBERS]
    data = fk.load(read_json(whole / "config.json")["data"])
    ensemble = fk.evaluate(fk.ScoreEnsemble(members), data)["ndcg@10"]
    assert rows_of(whole, "table2")[f"score ensemble{EXTRA}"]["ndcg@10"] == ensemble


def test_rows_are_compared_with_equally_trained_ones(small: str, whole: Path) -> None:
    data, rows = fk.load(small), rows_of(whole, "table2")
    for suffix in ("", EXTRA):
        best = max(MEMBERS, key=lambda name: rows[f"{name}{suffix}"]["validation_ndcg@10"])
        names = [row for row in rows if row.endswith(EXTRA) == bool(suffix)]
        for title, reference in (
            ("best member", best),
            ("uniform merge", "uniform merge"),
            ("as many passes", CONTROL),
        ):
            assert {rows[row]["over"][title]["model"] for row in names} == {reference + suffix}
        name = f"TIES{suffix}"
        gap = fk.compare(
            *(fk.evaluate(model_of(whole, row), data) for row in (name, best + suffix))
        )["ndcg@10"]
        over = dict(rows[name]["over"]["best member"])
        assert over.pop("model") == best + suffix and over == dataclasses.asdict(gap)


def test_sampled_metrics_are_evaluates_and_never_below_full_ones(small: str, whole: Path) -> None:
    data = fk.load(small)
    for table in ("table1", "table2"):
        rows = rows_of(whole, f"{table}-candidates")
        assert rows.keys() == rows_of(whole, table).keys()
        for row, content in rows.items():
            path = whole / table / artifact_name(row)
            full = load_reports(Path(f"{path}.reports.safetensors"))["test"]
            drawn = load_reports(Path(f"{path}.candidates.safetensors"))
            assert drawn.keys() == {"uniform-100", "popular-100"}
            for kind, report in drawn.items():
                assert (report.ranks <= full.ranks).all() and (report.users == full.users).all()
                cell = content["candidates"][kind]
                assert cell["ndcg@10"] == report["ndcg@10"] >= full["ndcg@10"]
            assert content["candidates"]["full"]["ndcg@10"] == full["ndcg@10"]
    models = {name: model_of(whole, name) for name in ("uniform merge", MEMBERS[0])}
    rows = rows_of(whole, "table2-candidates")
    for kind in ("uniform-100", "popular-100"):
        reports = {name: fk.evaluate(m, data, candidates=kind) for name, m in models.items()}
        for name, report in reports.items():
            assert rows[name]["candidates"][kind]["ndcg@10"] == report["ndcg@10"]
        (best,) = (row for row in MEMBERS if rows[row]["chosen"])
        other = fk.evaluate(model_of(whole, best), data, candidates=kind)
        gap = fk.compare(reports["uniform merge"], other)["ndcg@10"]
        assert rows["uniform merge"]["candidates"][kind]["over"] == dataclasses.asdict(gap)


@pytest.mark.parametrize(
    ("title", "how"),
    [
        ("topk 2", {"sampler": "topk", "k": 2}),
        ("model 2, batch-wise", {"sampler": "model", "k": 2, "reduction": "batchwise"}),
        ("target", {"sampler": "target"}),
    ],
)
def test_a_samplers_row_is_the_merge_with_that_fisher(
    small: str, whole: Path, title: str, how: dict[str, Any]
) -> None:
    data = fk.load(small)
    members = [model_of(whole, name) for name in MEMBERS]
    loader = data.loader(split="train", max_len=8, limit=20)
    fishers = [fk.diag_fisher(m, loader, progress=False, **how) for m in members]
    exact = [fk.diag_fisher(m, loader, progress=False, sampler="exact") for m in members]
    merged = fk.merge(members, method="fisher", fishers=fishers, floor=0.1)
    row = rows_of(whole, "samplers")[f"Fisher merge, {title}, floor 0.1"]
    report = fk.evaluate(merged, data)
    assert row["ndcg@10"] == report["ndcg@10"]
    uniform = fk.evaluate(fk.merge(members, method="uniform"), data)
    gap = dataclasses.asdict(fk.compare(report, uniform)["ndcg@10"])
    assert row["over"]["uniform merge"] == {"model": "uniform merge", **gap}
    unscaled, scaled = [], []
    for found, right in zip(fishers, exact, strict=True):
        f, r = (
            np.concatenate([t.double().numpy().ravel() for t in x.values()]) for x in (found, right)
        )
        unscaled.append(np.linalg.norm(f - r) / np.linalg.norm(r))
        scaled.append(np.linalg.norm(f * (f @ r) / (f @ f) - r) / np.linalg.norm(r))
    assert row["columns"]["error, unscaled"] == pytest.approx(np.mean(unscaled), rel=1e-6)
    assert row["columns"]["error, best-scaled"] == pytest.approx(np.mean(scaled), rel=1e-5)


def hits(report: fk.Report) -> np.ndarray:
    return np.array([rank <= 10 for rank in report.ranks.tolist()])


def test_inconsistency_and_gains_of_pairs(small: str, whole: Path) -> None:
    data = fk.load(small)
    rows = rows_of(whole, "table2-pairs")
    members = {name: model_of(whole, name) for name in MEMBERS}
    test = {name: fk.evaluate(m, data) for name, m in members.items()}
    validation = {name: fk.evaluate(m, data, split="validation") for name, m in members.items()}
    assert len(rows) == 6
    for a, b in itertools.combinations(MEMBERS, 2):
        row = rows[f"{a} and {b}"]
        assert row["inconsistency"] == np.mean(hits(test[a]) ^ hits(test[b]))
        better = max((a, b), key=lambda name: validation[name]["ndcg@10"])
        assert row["better"] == better
    pair = [members[a], members[b]]
    for title, model in (
        ("ensemble", fk.ScoreEnsemble(pair)),
        ("uniform merge", fk.merge(pair, method="uniform")),
    ):
        gap = fk.compare(fk.evaluate(model, data), test[better])["ndcg@10"]
        assert row["over"][title] == dataclasses.asdict(gap)


def test_means_over_seeds(small: str, whole: Path, tmp_path: Path) -> None:
    """The second seed is the first with the reports of two members exchanged."""
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    for table in ("table1", "table2"):
        shutil.copytree(out / table / "seed-0", out / table / "seed-1")
    a, b, c = MEMBERS[:3]
    for kind in ("reports", "candidates"):
        for name, other in ((a, b), (b, a)):
            target = artifact_name(name).replace("seed-0", "seed-1")
            source = whole / "table1" / f"{artifact_name(other)}.{kind}.safetensors"
            shutil.copy(source, out / "table1" / f"{target}.{kind}.safetensors")
    settings = Paper.on(small, **TINY)
    result = run_paper(settings, out, seeds=(0, 1), time_limit=0.0, progress=False)
    assert result["missing"] == {} and result["seeds"] == [0, 1]
    parts = {
        name: [{row["model"]: row for row in table["rows"]} for table in own["tables"]]
        for name, own in result["parts"].items()
    }
    one, other, mean = parts["table1-pairs"]
    for pair in one:
        expected = (one[pair]["inconsistency"] + other[pair]["inconsistency"]) / 2
        assert mean[pair]["inconsistency"] == expected
    assert other[f"{a} and {c}"]["inconsistency"] == one[f"{b} and {c}"]["inconsistency"]
    one, other, mean = parts["table1-candidates"]
    for row, kind in itertools.product((a, b), ("full", "uniform-100")):
        each = [by[row]["candidates"][kind]["ndcg@10"] for by in (one, other)]
        assert mean[row]["candidates"][kind]["ndcg@10"] == pytest.approx(np.mean(each), abs=1e-12)
    one, _, mean = parts["samplers"]
    assert [mean[row].get("columns") for row in mean] == [one[row].get("columns") for row in one]
    text = (out / "paper.md").read_text()
    assert text.count("mean over the seeds") == 7 and "seed 1\n" not in text
    (out / "table1" / "seed-1" / "uniform-merge.reports.safetensors").unlink()
    run_paper(settings, out, seeds=(0, 1), time_limit=0.0, progress=False)
    text = (out / "paper.md").read_text()
    assert text.count("mean over the seeds") == 5 and text.count("\nseed 1\n") == 2
    assert "not there yet, seed 1: uniform merge\n" in text


def test_a_table_made_alone_is_gone_on_from(
    small: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "table2", tmp_path / "table2")
    for path in (tmp_path / "table2" / "seed-0").glob("*.candidates.safetensors"):
        path.unlink()
    command = ["paper", "--data", small, "--out", str(tmp_path), "--quiet"]
    given = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    assert main([*command, *given, "--time-limit", "0"]) == 0
    printed, said = capsys.readouterr()
    assert printed.startswith((tmp_path / "paper.md").read_text().rstrip())
    assert said.endswith("the time is up: the same command goes on from here\n")
    result = read_json(tmp_path / "result.json")
    parts = ["table1", "table1-candidates", "table1-pairs", "table2-candidates"]
    assert sorted(result["missing"]) == sorted([*parts, "pictures"])
    assert result["missing"]["pictures"] == ["sorted-probabilities-table1", "plane-table1"]


def test_a_base_from_a_file_gives_all_parts_its_sizes(
    small: str, whole: Path, tmp_path: Path
) -> None:
    base = str(whole / "table2" / "seed-0" / "base.safetensors")
    settings = Paper.on(small, base=base, **{**TINY, "dim": 64})
    result = run_paper(settings, tmp_path, time_limit=0.0, progress=False)
    parts = ("table1", "table2", "samplers")
    assert [result["parts"][part]["settings"]["dim"] for part in parts] == [8, 8, 8]
    assert [result["parts"][part]["settings"]["base"] is None for part in parts] == [
        True,
        False,
        False,
    ]
    assert result["settings"]["base"].startswith("BERT4Rec ")


def test_refusals_of_folder_and_catalogue(whole: Path, small: str, tmp_path: Path) -> None:
    for name, value in (("lr", 0.5), ("cost_sequences", 9)):
        with pytest.raises(fk.InputError, match=rf"config.json: holds a run with .*\({name}\)"):
            run_paper(Paper.on(small, **{**TINY, name: value}), whole, progress=False)
    path = tmp_path / "narrow.txt"
    write_seqrec(fk.synthetic(20, 60, clusters=8), path)
    with pytest.raises(fk.InputError, match="needs 100 unseen items for every user"):
        run_paper(Paper.on(str(path), **TINY), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
