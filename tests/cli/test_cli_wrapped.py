"""`fisherkern merge --method weight_ensemble`, `representation-surgery`, `repair`: as in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.data import write_seqrec
from fisherkern.files import read_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a base, two members near it and another class's model, all untrained."""
    folder = tmp_path_factory.mktemp("wrapped")
    write_seqrec(fk.synthetic(40, 30, clusters=8), folder / "data.txt")
    data = fk.load(folder / "data.txt")
    torch.manual_seed(0)
    base = fk.SASRec(data.num_items, max_len=6, dim=8, layers=2, heads=2)
    for name in ("base", "m1", "m2"):
        model = fk.SASRec(**base.config)
        model.item_ids = list(data.item_ids)
        for own, start in zip(model.parameters(), base.parameters(), strict=True):
            own.data = start.data + 0.2 * torch.randn_like(start)
        fk.save_model(model, folder / f"{name}.safetensors")
    other = fk.GRU4Rec(data.num_items, max_len=6, dim=8)
    other.item_ids = list(data.item_ids)
    fk.save_model(other, folder / "gru.safetensors")
    return folder


def of(folder: Path, *names: str) -> list[str]:
    return [str(folder / f"{name}.safetensors") for name in names]


def models(folder: Path, *names: str) -> list[fk.SequenceEncoder]:
    return [fk.load_model(path) for path in of(folder, *names)]


def assert_evaluates(path: Path, folder: Path, out: Path) -> None:
    flags = ["--data", str(folder / "data.txt"), "--quiet", "--out", str(out), "--split", "test"]
    assert main(["evaluate", str(path), "--against", *of(folder, "m1"), *flags]) == 0
    report = fk.evaluate(fk.load_model(path), fk.load(folder / "data.txt"), progress=False)
    assert read_json(out / "result.json")[str(path)]["metrics"]["ndcg@10"] == report["ndcg@10"]


@pytest.mark.parametrize("density", [None, 0.4])
def test_a_weight_ensemble_is_that_of_python(
    density: float | None, folder: Path, tmp_path: Path
) -> None:
    data = fk.load(folder / "data.txt")
    loader = data.loader(split="validation", batch_size=128, max_len=6)
    m1, m2, base = models(folder, "m1", "m2", "base")
    given = {} if density is None else {"efficient": True, "density": density}
    expected = fk.weight_ensemble(
        [m1, m2], base=base, loader=loader, steps=3, scale=0.5, lr=0.01, seed=4, **given
    )
    flags = ["--option", "scale=0.5", "--option", "lr=1e-2", "--steps", "3", "--seed", "4"]
    flags += ["--data", str(folder / "data.txt"), "--base", *of(folder, "base")]
    lines = ["members: [m1.safetensors, m2.safetensors]", "base: base.safetensors", "seed: 4"]
    lines += ["method: weight_ensemble", "steps: 3", "data: data.txt"]
    options = "scale: 0.5, lr: 1e-2"
    if density is not None:
        flags += ["--option", f"density={density}"]
        options += f", density: {density}"
    recipe = folder / "ensemble.yaml"
    recipe.write_text("\n".join([*lines, f"options: {{{options}}}", ""]))
    first = ["merge", *of(folder, "m1", "m2"), "--method", "weight_ensemble", *flags]
    assert main([*first, "--out", str(tmp_path / "a")]) == 0
    assert main(["merge", "--recipe", str(recipe), "--out", str(tmp_path / "b")]) == 0
    for name in "ab":
        found = fk.load_model(tmp_path / name / "merged.safetensors")
        assert type(found) is fk.WeightEnsemble and found.config == expected.config
        for key, value in expected.state_dict().items():
            assert torch.equal(found.state_dict()[key], value), key
        report = read_json(tmp_path / name / "result.json")["report"]
        assert report == expected.merge_report
    assert_evaluates(tmp_path / "a" / "merged.safetensors", folder, tmp_path / "e")


@pytest.mark.parametrize("version", [1, 2])
def test_a_corrected_model_is_that_of_python(version: int, folder: Path, tmp_path: Path) -> None:
    data = fk.load(folder / "data.txt")
    loader = data.loader(split="train", batch_size=128, max_len=6)
    base, m1, m2 = models(folder, "base", "m1", "m2")
    given = {"version": version, "rank": 3, "steps": 4, "lr": 0.01, "seed": 2}
    expected = fk.representation_surgery(base, [m1, m2], loader, weights=[3, 1], **given)
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    flags += ["--members", *of(folder, "m1", "m2"), "--weights", "3,1"]
    flags += ["--data", str(folder / "data.txt"), "--out", str(tmp_path)]
    assert main(["representation-surgery", *of(folder, "base"), *flags]) == 0
    found = fk.load_model(tmp_path / "corrected.safetensors")
    assert type(found) is fk.SurgeryEncoder
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    assert read_json(tmp_path / "result.json")["losses"] == expected.losses
    assert_evaluates(tmp_path / "corrected.safetensors", folder, tmp_path / "e")


def test_a_repaired_model_is_that_of_python(folder: Path, tmp_path: Path) -> None:
    data = fk.load(folder / "data.txt")
    base, m1, m2 = models(folder, "base", "m1", "m2")
    flags = [*of(folder, "base"), "--members", *of(folder, "m1", "m2")]
    flags += ["--data", str(folder / "data.txt"), "--out", str(tmp_path)]
    for more, limit, weights in ((["--limit", "9", "--weights", "3,1"], 9, [3, 1]), ([], 40, None)):
        loader = data.loader(max_len=6, limit=limit)
        expected = fk.repair(base, [m1, m2], loader, weights=weights)
        assert main(["repair", *flags, *more]) == 0
        found = fk.load_model(tmp_path / "repaired.safetensors")
        assert type(found) is type(base)
        for key, value in expected.state_dict().items():
            assert torch.equal(found.state_dict()[key], value), key
        assert not torch.equal(found.final_norm.weight, base.final_norm.weight)
    about = read_json(tmp_path / "repaired.json")["extra"]["repaired"]
    assert about == {"merged": flags[0], "members": flags[2:4]}
    assert_evaluates(tmp_path / "repaired.safetensors", folder, tmp_path / "e")


ENSEMBLE = ["merge", "m1", "m2", "--method", "weight_ensemble", "--base", "base"]
SURGERY = ["representation-surgery", "base", "--members", "m1", "m2"]
REPAIR = ["repair", *SURGERY[1:]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (ENSEMBLE, "--data: name a data set"),
        (ENSEMBLE[:-2] + ["--data", "D"], "method 'weight_ensemble' needs base"),
        (ENSEMBLE + ["--data", "D", "--weights", "1,2"], "takes no weights"),
        (ENSEMBLE + ["--data", "D", "--fisher", "m1", "m2"], "takes no fishers"),
        (ENSEMBLE + ["--data", "D", "--option", "alfa=1"], "has no option 'alfa'; it has object"),
        (ENSEMBLE + ["--data", "D", "--option", "density=2"], "option 'density' is 2 where"),
        (ENSEMBLE + ["--data", "D", "--steps", "-1"], "steps is -1"),
        (ENSEMBLE + ["--stream"], "method 'weight_ensemble' needs models of ours"),
        (["merge", "gru", "gru", *ENSEMBLE[3:5], "--base", "gru", "--data", "D"], "GRU4Rec has no"),
        (SURGERY, "--data: name a data set"),
        (SURGERY + ["--data", "D", "--rank", "0"], "rank is 0"),
        (SURGERY + ["--data", "D", "--version", "3"], "version is 3"),
        (SURGERY + ["--data", "D", "--weights", "1"], "weights has 1 numbers for 2 members"),
        (SURGERY + ["--data", "D", "--weights", "search"], "weights is 'search' where 2"),
        (
            ["representation-surgery", "base", "--members", "gru", "--data", "D"],
            "member 0 is a GRU4Rec",
        ),
        (
            ["representation-surgery", "base", "--members", "gone.safetensors", "--data", "D"],
            "no such file",
        ),
        (REPAIR, "--data: name a data set"),
        (REPAIR + ["--data", "D", "--limit", "0"], "limit"),
        (REPAIR + ["--data", "D", "--weights", "search"], "weights is 'search' where 2"),
        (["repair", "base", "--members", "gru", "--data", "D"], "GRU4Rec"),
        (["repair", "base", "--members", "gone.safetensors", "--data", "D"], "no such file"),
        (["repair", "gru", "--members", "gru", "--data", "D"], "norm"),
    ],
)
def test_what_is_wrong_is_one_line(
    flags: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {name: of(folder, name)[0] for name in ("m1", "m2", "base", "gru")}
    known["D"] = str(folder / "data.txt")
    out = tmp_path / "out"
    assert main([known.get(flag, flag) for flag in flags] + ["--out", str(out)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed, printed
    assert not out.exists()
