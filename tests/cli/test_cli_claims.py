"""What a command may write over: what it made itself, and nothing of anybody else's."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
import torch

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.data import write_seqrec
from fisherkern.files import read_json

TRAIN = "train --data {in}/data.txt --encoder SASRec --dim 8 --layers 1 --max-len 6 --epochs 1 "
OTHERS = "{in}/a.safetensors {in}/b.safetensors"
COMMANDS = {
    "align": (f"align {OTHERS}", "aligned-1.safetensors"),
    "merge": (f"merge {OTHERS}", "merged.safetensors"),
    "merge from disk": (f"merge {OTHERS} --stream", "merged.safetensors"),
    "repair": (
        f"repair {{in}}/a.safetensors --members {OTHERS} --data {{in}}/data.txt --quiet",
        "repaired.safetensors",
    ),
    "representation-surgery": (
        f"representation-surgery {{in}}/a.safetensors --members {OTHERS} --data {{in}}/data.txt "
        "--steps 1 --quiet",
        "corrected.safetensors",
    ),
    "fisher": (
        "fisher {in}/a.safetensors --data {in}/data.txt --k 3 --quiet",
        "a.fisher.safetensors",
    ),
    "train": (TRAIN + "--quiet", "model.safetensors"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    data = fk.synthetic(40, 30, clusters=8)
    write_seqrec(data, folder / "data.txt")
    data = fk.load(folder / "data.txt")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = fk.SASRec(data.num_items, max_len=6, dim=8, layers=1)
        model.item_ids = list(data.item_ids)
        fk.save_model(model, folder / f"{name}.safetensors")
    return folder


def run(command, folder, out, *more):
    text = COMMANDS[command][0] if command in COMMANDS else command
    return main([*text.format(**{"in": folder}).split(), "--out", str(out), *more])


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("ending", ["", ".json"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_somebody_else_stays(command, ending, folder, tmp_path, capsys):
    target = COMMANDS[command][1]
    own = tmp_path / (target if not ending else target.replace(".safetensors", ending))
    own.write_text("mine")
    assert run(command, folder, tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{own.name}: exists, and `fisherkern" in error
    assert contents(tmp_path) == {own.name: b"mine"}
    # And again: a refusal must not pass for a claim.
    assert run(command, folder, tmp_path) == 2
    assert contents(tmp_path) == {own.name: b"mine"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_command_may_run_again(command, folder, tmp_path):
    assert run(command, folder, tmp_path) == 0
    before = contents(tmp_path)
    assert run(command, folder, tmp_path) == 0
    assert contents(tmp_path) == before


def test_inputs_are_never_written_over(folder, tmp_path, capsys):
    assert run("align", folder, tmp_path) == 0
    before = contents(tmp_path)
    text = "align {in}/b.safetensors " + str(tmp_path / "aligned-1.safetensors")
    assert run(text, folder, tmp_path) == 2
    assert "would be written over, and is read" in capsys.readouterr().err
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "aligned-2.safetensors")
    assert run(f"align {{in}}/b.safetensors {link}", folder, tmp_path) == 2
    link.unlink()
    assert contents(tmp_path) == before
    assert run("merge", folder, tmp_path / "m") == 0
    again = f"merge {{in}}/a.safetensors {tmp_path}/m/merged.safetensors"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"members: [m/merged.safetensors, {folder}/a.safetensors]\nout: m\n")
    for text in (again, again + " --stream"):
        assert run(text, folder, tmp_path / "m") == 2
    assert main(["merge", "--recipe", str(recipe)]) == 2


def test_train_does_not_go_over_another_finished_run(folder, tmp_path, capsys):
    assert run("train", folder, tmp_path) == 0
    before = contents(tmp_path)
    for more, said in (
        (("--seed", "1"), "seed = 0, not 1"),
        (("--epochs", "2"), "epochs = 1, not 2"),
        (("--init", str(folder / "a.safetensors")), "init = None, not"),
        (("--patience", "3"), "patience = None, not 3"),
    ):
        assert run("train", folder, tmp_path, *more) == 2
        assert said in capsys.readouterr().err
        assert contents(tmp_path) == before
    assert run("train", folder, tmp_path, "--threads", "1", "--save-every-steps", "9") == 0
    assert contents(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("more", [("--init", "b"), ("--score", "hr@5"), ("--seed", "3")])
def test_an_interrupted_run_goes_on_as_itself_alone(more, folder, tmp_path, monkeypatch, capsys):
    """--init A, killed, and --init B: refused, not gone on with A's weights and B's name."""
    more = [str(folder / "b.safetensors") if word == "b" else word for word in more]
    start = ["--init", str(folder / "a.safetensors"), "--validate-every", "1"]
    text = "train --data {in}/data.txt --epochs 3 --quiet"
    assert run(text, folder, tmp_path / "whole", *start) == 0
    calls = []
    evaluate = fk.cli.train.evaluate

    def interrupted(*given, **named):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*given, **named)

    out = tmp_path / "out"
    monkeypatch.setattr("fisherkern.cli.train.evaluate", interrupted)
    assert run(text, folder, out, *start) == 130
    assert sorted(path.name for path in out.iterdir()) == ["state.safetensors"]
    state = contents(out)
    capsys.readouterr()
    assert run(text, folder, out, *start, *more) == 2
    assert "belongs to a run with" in capsys.readouterr().err
    assert contents(out) == state
    assert run(text, folder, out, *start) == 0
    for name in ("model.safetensors", "model.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_state_goes_last(folder, tmp_path, monkeypatch):
    """Whatever fails while results are written, the run can be gone on from."""

    def full(*_):
        raise fk.InputError("disk full")

    monkeypatch.setattr("fisherkern.cli.run.write_json", full)
    assert run("train", folder, tmp_path) == 2
    assert (tmp_path / "state.safetensors").exists()
    monkeypatch.undo()
    assert run("train", folder, tmp_path) == 0
    names = ["model.json", "model.safetensors", "result.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_results_of_several_commands_stand_beside_each_other(folder, tmp_path):
    assert run("train", folder, tmp_path) == 0
    assert run("fisher", folder, tmp_path) == 0
    assert read_json(tmp_path / "result.json")["arguments"]["command"] == "train"
    assert read_json(tmp_path / "result-fisher.json")["arguments"]["command"] == "fisher"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "result.json").write_text('{"my": "notes"}')
    assert run("data --data {in}/data.txt", folder, tmp_path / "x") == 0
    assert read_json(tmp_path / "x" / "result.json") == {"my": "notes"}


def test_a_folder_that_another_process_writes_to_is_refused(folder, tmp_path, capsys):
    claim = tmp_path / "running-merge.json"
    handle = os.open(claim, os.O_RDWR | os.O_CREAT)
    os.write(handle, json.dumps({"arguments": {"command": "merge"}}).encode())
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert run("merge", folder, tmp_path) == 2
    assert "another process is writing there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["running-merge.json"]
    assert run("align", folder, tmp_path) == 0  # other files, no quarrel
    os.close(handle)  # killed
    (tmp_path / "merged.safetensors").write_bytes(b"half of a merge that was killed")
    assert run("merge", folder, tmp_path) == 0
    assert not claim.exists() and Path(tmp_path / "result.json").exists()
