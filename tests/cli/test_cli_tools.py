"""`fisherkern align`, `preflight` and `merge --stream`: as in Python; one line for bad input."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.data import write_seqrec
from fisherkern.files import read_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a base, two members of other draws (untrained) with their Fishers, one of part."""
    folder = tmp_path_factory.mktemp("tools")
    write_seqrec(fk.synthetic(40, 30, clusters=8), folder / "data.txt")
    data = fk.load(folder / "data.txt")
    for number, name in enumerate(("base", "m1", "m2", "wide")):
        torch.manual_seed(number)
        dim = 12 if name == "wide" else 8
        # Only untied and with its norms before the sub-layers does it admit rotations.
        sizes = {"max_len": 6, "dim": dim, "layers": 1, "norm": "pre", "tied": False}
        model = fk.BERT4Rec(data.num_items, **sizes, init_std=0.3)
        model.item_ids = list(data.item_ids)
        fk.save_model(model, folder / f"{name}.safetensors")
        fisher = fk.diag_fisher(model, data.loader(max_len=6), k=5, progress=False)
        fisher.save(folder / f"{name}.fisher.safetensors")
    more = fk.BERT4Rec(data.num_items + 2, **{**sizes, "dim": 8})
    more.item_ids = [*data.item_ids, "new", "newer"]
    fk.save_model(more, folder / "more.safetensors")
    return folder


def members(folder: Path, *names: str) -> list[str]:
    return [str(folder / f"{name}.safetensors") for name in names or ("m1", "m2")]


def assert_written(entries: list[dict[str, Any]], expected: list[fk.SequenceEncoder]) -> None:
    for entry, model in zip(entries, expected, strict=True):
        aligned = fk.load_model(entry["aligned"])
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, aligned.get_parameter(name)), name


def test_align_is_that_of_python(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [fk.load_model(path) for path in members(folder)]
    for flags, settings in (
        (["--sweeps", "2"], {"sweeps": 2}),
        (["--no-rotate"], {"rotate": False}),
    ):
        expected = fk.align(models, **settings)
        assert main(["align", *members(folder), *flags, "--out", str(tmp_path)]) == 0
        found = read_json(tmp_path / "result.json")["members"]
        assert [entry["member"] for entry in found] == members(folder)
        history = torch.tensor([[0, 0, 3, 1, 2, 9]])
        for entry, member, model in zip(found, models, expected, strict=True):
            aligned = fk.load_model(entry["aligned"])
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, aligned.get_parameter(name)), name
            assert aligned.item_ids == member.item_ids
            torch.testing.assert_close(aligned(history), member(history))
            assert entry["distance_after"] == model.align_report["distance_after"]
            extra = read_json(Path(entry["aligned"]).with_suffix(".json"))["extra"]
            assert extra["align_report"]["distance_after"] == entry["distance_after"]
        assert found[1]["distance_after"] < found[1]["distance_before"]
    assert "aligned-2.safetensors" in capsys.readouterr().out


def test_align_by_activations_is_that_of_python(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over the catalogue of the first, which holds more items than the data."""
    names = members(folder, "more", "m1")
    models = [fk.load_model(path) for path in names]
    data = fk.load(folder / "data.txt").with_items(models[0].item_ids)
    loader = data.loader(batch_size=128, max_len=6, limit=30)
    expected = fk.align(models, by="activations", loader=loader)
    flags = ["--by", "activations", "--data", str(folder / "data.txt"), "--limit", "30"]
    assert main(["align", *names, *flags, "--out", str(tmp_path)]) == 0
    found = read_json(tmp_path / "result.json")["members"]
    assert_written(found, expected)
    assert found[1]["agreement"] == expected[1].align_report["agreement"]
    assert found[1]["by"] == "activations" and "agreement" not in found[0]
    assert "aligned-2.safetensors: residual correlates " in capsys.readouterr().out


def test_align_by_the_loss_is_that_of_python(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = members(folder)
    data = fk.load(folder / "data.txt")
    windows = data.first_windows(4, batch_size=64, max_len=6, seed=5)
    how = {"objective": fk.MaskedItems(), "steps": 4, "seed": 5}
    expected = fk.align([fk.load_model(path) for path in names], by="loss", loader=windows, **how)
    flags = ["--by", "loss", "--data", str(folder / "data.txt"), "--steps", "4", "--seed", "5"]
    assert main(["align", *names, *flags, "--out", str(tmp_path)]) == 0
    found = read_json(tmp_path / "result.json")["members"]
    assert_written(found, expected)
    assert all(entry["loss"] == expected[0].align_report["loss"] for entry in found)
    before, after = found[0]["loss"]
    assert after < before
    assert f"training loss of the average: {before:.4f} matched by weights, now {after:.4f}" in (
        capsys.readouterr().out
    )


def test_merge_streams_members_of_other_catalogues(folder: Path, tmp_path: Path) -> None:
    names = members(folder, "m1", "more")
    for flags in ([], ["--stream"]):
        assert main(["merge", *names, *flags, "--out", str(tmp_path / f"x{len(flags)}")]) == 0
    one, two = (fk.load_model(tmp_path / f"x{n}" / "merged.safetensors") for n in (0, 1))
    assert one.item_ids == two.item_ids and len(one.item_ids or []) == one.num_items
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name)), name


def test_preflight_with_data_and_base(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder / "data.txt"
    flags = ["--base", *members(folder, "base"), "--data", str(data), "--points", "1"]
    assert main(["preflight", *members(folder), *flags, "--out", str(tmp_path)]) == 0
    found = read_json(tmp_path / "result.json")
    models = [fk.load_model(path) for path in members(folder)]
    flat = [torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in models]
    start = fk.load_model(folder / "base.safetensors")
    base = torch.cat([p.detach().double().flatten() for p in start.parameters()])
    for a, b in itertools.product(range(2), repeat=2):
        cosine = torch.nn.functional.cosine_similarity(flat[a], flat[b], dim=0)
        assert found["cosine"][a][b] == pytest.approx(cosine.item())
        change = torch.nn.functional.cosine_similarity(flat[a] - base, flat[b] - base, dim=0)
        assert found["task_cosine"][a][b] == pytest.approx(change.item())
    between = fk.merge(models)
    reports = [
        fk.evaluate(model, fk.load(data), split="validation")
        for model in (models[0], between, models[1])
    ]
    assert found["paths"][0]["scores"] == pytest.approx([r["ndcg@10"] for r in reports])
    apart = reports[0].per_user["hr@10"] != reports[2].per_user["hr@10"]
    assert found["inconsistency"][0][1] == pytest.approx(apart.mean())
    printed = capsys.readouterr().out
    assert found["verdict"] in printed and f"{reports[0]['ndcg@10']:.4f}" in printed
    assert "merge by auto" in printed


def test_preflight_of_weights_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preflight", *members(folder), "--out", str(tmp_path)]) == 0
    found = read_json(tmp_path / "result.json")
    assert found["scores"] is None and found["task_cosine"] is None
    printed = capsys.readouterr().out
    assert "recipe: align, then merge by uniform, then train on" in printed
    assert "cosine of changes" not in printed and "NDCG" not in printed


def test_preflight_of_other_catalogues_scores_the_union(folder: Path, tmp_path: Path) -> None:
    flags = ["--data", str(folder / "data.txt"), "--points", "1", "--out", str(tmp_path)]
    assert main(["preflight", *members(folder, "m1", "more"), *flags]) == 0
    found = read_json(tmp_path / "result.json")
    assert found["items"] == {"1": 2, "2": 30} and len(found["paths"][0]["scores"]) == 3


def test_auto_merge_of_other_catalogues(folder: Path, tmp_path: Path) -> None:
    flags = ["--method", "auto", "--data", str(folder / "data.txt"), "--steps", "1", "--quiet"]
    assert main(["merge", *members(folder, "m1", "more"), *flags, "--out", str(tmp_path)]) == 0
    assert fk.load_model(tmp_path / "merged.safetensors").num_items == 32


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--weights", "1,3"],
        ["--fisher", "m1.fisher", "m2.fisher", "--floor", "0.5", "--option", "group=row"],
        ["--base", "base", "--method", "task_arithmetic", "--option", "scale=0.5"],
        ["--base", "base", "--method", "dare", "--seed", "3"],
    ],
)
def test_stream_is_the_merge_in_memory(flags: list[str], folder: Path, tmp_path: Path) -> None:
    kept = {"m1.fisher", "m2.fisher", "base"}
    flags = [str(folder / f"{flag}.safetensors") if flag in kept else flag for flag in flags]
    for name, more in (("memory", []), ("stream", ["--stream"])):
        out = ["--out", str(tmp_path / name)]
        assert main(["merge", *members(folder), *flags, *more, *out]) == 0
    one, two = (
        fk.load_model(tmp_path / name / "merged.safetensors") for name in ("memory", "stream")
    )
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name)), name
    one, two = (read_json(tmp_path / n / "result.json")["report"] for n in ("memory", "stream"))
    for key in ("method", "weights", "options", "floor", "normalize"):
        assert one[key] == two[key], key
    assert (tmp_path / "stream" / "merged.md").is_file()


def test_stream_beside_a_recipe(folder: Path, tmp_path: Path) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text("members: [m1.safetensors, m2.safetensors]\nweights: [1, 3]\n")
    assert main(["merge", "--recipe", str(recipe), "--stream", "--out", str(tmp_path)]) == 0
    assert read_json(tmp_path / "result.json")["report"]["weights"] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["align", "m1", "gone"], "gone.safetensors: no such file"),
        (["align", "m1", "wide"], "member 1 was built with dim=12"),
        (["align", "m1", "m2", "--sweeps", "0"], "sweeps is 0"),
        (["align"], "--checkpoints requires an argument (--help lists the options)"),
        (["preflight", "m1", "gone"], "gone.safetensors: no such file"),
        (["preflight", "m1", "wide"], "tensor '"),
        (["preflight", "m1", "m2", "--points", "0"], "points is 0"),
        (["preflight", "m1", "m2", "--data", "no.txt"], "no.txt"),
        (["merge", "m1", "wide", "--stream"], "wide.safetensors: tensor"),
        (["align", "m1", "m2", "--by", "activations"], "--data: name a data set"),
        (["align", "m1", "m2", "--by", "activations", "--data", "no.txt"], "no.txt"),
        (
            ["align", "m1", "m2", "--by", "heart"],
            'Invalid value "heart" for --by. Choose from: "weights", "activations", "loss"',
        ),
        (["merge", "m1", "m2", "--stream", "--method", "pcrec"], "method 'pcrec' is not one that"),
        (["merge", "m1", "m2", "--stream", "--weights", "search"], "takes numbers as weights"),
        (["merge", "m1", "m2", "--stream", "--steps", "3"], "a merge of files neither searches"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"m1", "m2", "wide", "more", "gone"}
    arguments = [str(folder / f"{a}.safetensors") if a in names else a for a in arguments]
    out = tmp_path / "out"
    status = main([*arguments, "--out", str(out)])
    printed = capsys.readouterr().err
    assert status == 2 and message in printed and printed.count("\n") == 1, printed
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("command", ["align", "preflight", "merge"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--checkpoints" in printed
    assert {"align": "--sweeps", "preflight": "--points", "merge": "--stream"}[command] in printed
