"""`fisherkern train`: its encoders, objectives and settings, its configuration file, torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.data import write_seqrec
from fisherkern.files import read_json

SMALL = ["--max-len", "6", "--dim", "8", "--epochs", "2", "--batch-size", "16", "--quiet"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "data.txt"
    write_seqrec(fk.synthetic(40, 30, clusters=8), path)
    return str(path)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return fk.load_model(path).state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    ("flags", "objective"),
    [
        (["--encoder", "SASRec", "--heads", "2", "--no-tied"], fk.NextItem()),
        (["--encoder", "GRU4Rec", "--bias"], fk.NextItem()),
        (["--encoder", "Caser", "--window", "3"], fk.NextItem()),
        (["--encoder", "YouTubeDNN", "--layers", "2"], fk.NextItem()),
        (
            ["--encoder", "FISM", "--objective", '{"name": "NextItem", "loss": "bpr"}'],
            fk.NextItem("bpr"),
        ),
        (["--objective", "next"], fk.NextItem(last_only=True)),
        (["--mask-ratio", "0.4"], fk.MaskedItems(0.4)),
        (
            ["--contrastive", "cl4srec", "--contrastive-weight", "0.3"],
            fk.MaskedItems(0.2) + 0.3 * fk.CL4SRec(),
        ),
        (
            ["--encoder", "SASRec", "--objective", '{"name": "NextItem", "loss": "bce"}'],
            fk.NextItem(loss="bce"),
        ),
    ],
)
def test_encoders_and_objectives(
    flags: list[str], objective: fk.MaskedItems, data: str, tmp_path: Path
) -> None:
    assert main(["train", "--data", data, *SMALL, *flags, "--out", str(tmp_path)]) == 0
    found = fk.load_model(tmp_path / "model.safetensors")
    loaded = fk.load(data)
    torch.manual_seed(0)
    model = type(found)(**found.config)
    log = fk.train(model, loaded, objective=objective, epochs=2, batch_size=16, progress=False)
    assert_same(model.state_dict(), found.state_dict())
    assert read_json(tmp_path / "result.json")["losses"] == log.losses
    for flag, value in {"--heads": 2, "--no-tied": False, "--bias": True, "--window": 3}.items():
        if flag in flags:
            assert found.config[flag.split("-")[-1]] == value


def test_categories_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_seqrec(fk.synthetic(40, 30, clusters=8), tmp_path / "data.txt")
    path, out = str(tmp_path / "data.txt"), tmp_path / "out"
    flags = ["--encoder", "SASRec", "--categories", "--id-dropout", "0.3"]
    assert main(["train", "--data", path, *SMALL, *flags, "--out", str(out)]) == 0
    found, loaded = fk.load_model(out / "model.safetensors"), fk.load(path)
    torch.manual_seed(0)
    items = fk.ItemParts.of(loaded, id_dropout=0.3)
    model = fk.SASRec(30, max_len=6, dim=8, items=items)
    how = {"objective": fk.NextItem(), "epochs": 2, "batch_size": 16}
    fk.train(model, loaded, progress=False, **how)
    assert_same(model.state_dict(), found.state_dict())
    again = ["--init", str(out / "model.safetensors"), "--categories", "--out", f"{out}2"]
    assert main(["train", "--data", path, *SMALL, *again]) == 2
    assert "--categories: items are made as those of" in capsys.readouterr().err
    (tmp_path / "data.attributes.json").unlink()
    assert main(["train", "--data", path, "--categories", "--out", f"{out}3"]) == 2
    assert "--categories: data has no attributes" in capsys.readouterr().err


def test_settings_early_stopping_and_the_averaged_member(data: str, tmp_path: Path) -> None:
    flags = ["--patience", "2", "--score", "hr@5", "--ema", "0.9", "--clip", "none", "--lr", "0.03"]
    flags += ["--warmup-steps", "3", "--betas", "0.8", "0.9", "--epochs", "30"]
    assert main(["train", "--data", data, *SMALL, *flags, "--out", str(tmp_path)]) == 0
    loaded = fk.load(data)
    torch.manual_seed(0)
    model = fk.BERT4Rec(loaded.num_items, max_len=6, dim=8)
    log = fk.train(
        model,
        loaded,
        validate=lambda model: fk.evaluate(model, loaded, split="validation", k=(5,))["hr@5"],
        patience=2,
        epochs=30,
        batch_size=16,
        ema=0.9,
        clip=None,
        lr=0.03,
        warmup_steps=3,
        betas=(0.8, 0.9),
        progress=False,
    )
    assert log.ema is not None and 2 < len(log.scores) < 30
    assert_same(model.state_dict(), weights(tmp_path / "model.safetensors"))
    assert_same(log.ema.state_dict(), weights(tmp_path / "ema.safetensors"))
    result = read_json(tmp_path / "result.json")
    assert result["best_epoch"] == log.best_epoch
    assert list(result["scores"].values()) == list(log.scores.values())
    about = read_json(tmp_path / "ema.json")["metrics"]
    assert about == dict(fk.evaluate(log.ema, loaded, split="validation"))


def test_a_result_is_a_configuration(data: str, tmp_path: Path) -> None:
    flags = ["--encoder", "SASRec", "--no-scaled", "--clip", "none", "--seed", "3", "--crop", "all"]
    flags += ["--objective", '{"name": "NextItem", "loss": "bce", "negatives": 5}']
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert main(["train", "--data", data, *SMALL, *flags, "--out", str(first)]) == 0
    config = ["--config", str(first / "result.json")]
    assert main(["train", *config, "--out", str(second)]) == 0
    assert_same(weights(first / "model.safetensors"), weights(second / "model.safetensors"))
    once, again = (read_json(path / "result.json")["arguments"] for path in (first, second))
    assert {**again, "out": 0, "config": 0} == {**once, "out": 0, "config": 0}
    # A flag overrides the file, wherever it stands.
    assert main(["train", "--seed", "4", *config, "--epochs", "1", "--out", str(third)]) == 0
    third_arguments = read_json(third / "result.json")["arguments"]
    assert third_arguments["seed"] == 4 and third_arguments["epochs"] == 1
    assert fk.load_model(third / "model.safetensors").config["scaled"] is False


def test_a_configuration_by_hand(data: str, tmp_path: Path) -> None:
    content = {
        "data": data,
        "quiet": True,
        "max_len": 6,
        "dim": 8,
        "epochs": 1,
        "betas": [0.9, 0.99],
        "tied": False,
        "objective": {"name": "MaskedItems", "ratio": 0.5},
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    assert main(["train", "--config", str(path), "--out", str(tmp_path / "out")]) == 0
    model = fk.load_model(tmp_path / "out" / "model.safetensors")
    assert model.config["tied"] is False and model.config["dim"] == 8
    arguments = read_json(tmp_path / "out" / "result.json")["arguments"]
    assert json.loads(arguments["objective"]) == {"name": "MaskedItems", "ratio": 0.5}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--encoder", "GRU4Rec", "--heads", "2"], "--heads: GRU4Rec has no heads"),
        (["--encoder", "GPT"], "--encoder"),
        (["--objective", "mask"], "--objective: 'mask' is neither"),
        (["--objective", "[1]"], "--objective: '[1]' is neither"),
        (["--objective", '{"name": "Cloze"}'], "unknown objective 'Cloze'"),
        (["--patience", "0"], "patience must be at least 1"),
        (["--patience", "1", "--score", "auc"], "--score: 'auc'"),
        (["--precision", "fp8"], "--precision"),
        (["--clip", "x"], 'Invalid value for --clip: unable to convert "x" into float'),
        (["--ema", "1"], "ema must be in [0, 1)"),
        (["--device", "tpu7"], "--device: 'tpu7'"),
        (["--config", "CONFIG"], "Unknown option"),
        (["--config", "LIST"], "list.json: must hold a JSON object"),
        (["--config", "NONE"], "none.json: no such file"),
        (["--init", "INIT", "--dim", "16"], "--dim: "),
        (["--init", "INIT", "--encoder", "SASRec"], "--encoder: "),
        (["--id-dropout", "0.5"], "--id-dropout: leaves rows out for categories"),
    ],
)
def test_bad_input(
    flags: list[str],
    named: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_text('{"colour": "red"}')
    (tmp_path / "list.json").write_text("[1]")
    model = fk.BERT4Rec(30, max_len=6, dim=8)
    fk.save_model(model, tmp_path / "init.safetensors")
    paths = {"CONFIG": "config.json", "LIST": "list.json", "NONE": "none.json"}
    paths["INIT"] = "init.safetensors"
    flags = [str(tmp_path / paths[flag]) if flag in paths else flag for flag in flags]
    out = tmp_path / "out"
    status = main(["train", "--data", data, *flags, "--quiet", "--out", str(out)])
    found = capsys.readouterr()
    assert status == 2
    assert named in found.err and found.err.count("\n") == 1, found.err
    assert not out.exists()


def test_two_processes_by_torchrun(data: str, tmp_path: Path) -> None:
    """The single process's weights to rounding, and every file written once."""
    flags = ["train", "--data", data, *SMALL, "--dropout", "0", "--patience", "5", "--ema", "0.9"]
    flags += ["--encoder", "GRU4Rec"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "fisherkern", *flags]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert main([*flags, "--out", str(tmp_path / "one")]) == 0
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))
    for name in ("model", "ema"):
        one = weights(tmp_path / "one" / f"{name}.safetensors")
        two = weights(tmp_path / "two" / f"{name}.safetensors")
        for key in one:
            assert torch.allclose(one[key], two[key], atol=2e-5), (name, key)
