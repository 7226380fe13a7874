"""The command line as a user meets it: what it writes, and one line and status 2 for bad input."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.data import write_seqrec
from fisherkern.files import read_json

MODEL = ["--max-len", "6", "--dim", "8", "--epochs", "1", "--batch-size", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file, two trained members of one base, and their Fishers."""
    folder = tmp_path_factory.mktemp("cli")
    data = folder / "data.txt"
    write_seqrec(fk.synthetic(40, 30, clusters=8), data)
    quiet = ["--data", str(data), "--quiet"]
    assert main(["train", *quiet, *MODEL, "--out", str(folder / "base")]) == 0
    for seed in ("1", "2"):
        out = str(folder / f"m{seed}")
        start = ["--init", str(folder / "base" / "model.safetensors"), "--seed", seed]
        assert main(["train", *quiet, *MODEL, *start, "--out", out]) == 0
        model = str(folder / f"m{seed}" / "model.safetensors")
        assert main(["fisher", model, *quiet, "--k", "5", "--out", out]) == 0
    return folder


def members(folder: Path) -> list[str]:
    return [str(folder / f"m{m}" / "model.safetensors") for m in (1, 2)]


def fishers(folder: Path) -> list[str]:
    return [str(folder / f"m{m}" / "model.fisher.safetensors") for m in (1, 2)]


def test_train_fisher_merge_evaluate(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(folder / "data.txt"), "--quiet"]
    out = tmp_path / "merged"
    arguments = ["merge", *members(folder), "--fisher", *fishers(folder), "--out", str(out)]
    assert main(arguments) == 0
    merged = fk.load_model(out / "merged.safetensors")
    expected = fk.merge(
        [fk.load_model(path) for path in members(folder)],
        fishers=[fk.DiagFisher.load(path) for path in fishers(folder)],
    )
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, merged.get_parameter(name)), name
    capsys.readouterr()
    path = str(out / "merged.safetensors")
    arguments = ["evaluate", path, *data, "--against", members(folder)[0], "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "full ranking, seen items excluded" in printed and "95 % interval" in printed
    result = read_json(out / "result-evaluate.json")  # beside that of the merge
    report = fk.evaluate(merged, fk.load(folder / "data.txt"))
    assert result[path]["metrics"] == pytest.approx(dict(report))
    assert result["difference"]["differences"]["ndcg@10"]["low"] is not None


def test_merge_of_two_catalogues_is_evaluated_on_either(folder: Path, tmp_path: Path) -> None:
    """A member trained on a part of the items joins one of all; the union serves both data."""
    part = tmp_path / "part.txt"
    lines = (folder / "data.txt").read_text().splitlines()
    part.write_text("\n".join(f"{line}0" for line in lines) + "\n")
    quiet = ["--data", str(part), "--quiet"]
    out = tmp_path / "part"
    assert main(["train", *quiet, *MODEL, "--out", str(out)]) == 0
    models = [members(folder)[0], str(out / "model.safetensors")]
    assert main(["merge", *models, "--out", str(tmp_path / "union")]) == 0
    union = tmp_path / "union" / "merged.safetensors"
    assert fk.load_model(union).num_items == 57  # 1..30, and 10, 20 .. 300
    for data in (part, folder / "data.txt"):
        arguments = ["evaluate", str(union), "--data", str(data), "--quiet"]
        assert main([*arguments, "--out", str(tmp_path / "report")]) == 0


def test_merge_with_searched_weights(folder: Path, tmp_path: Path) -> None:
    arguments = ["merge", *members(folder), "--fisher", *fishers(folder), "--weights", "search"]
    assert main([*arguments, "--data", str(folder / "data.txt"), "--out", str(tmp_path)]) == 0
    report = read_json(tmp_path / "result.json")["report"]
    assert [1.0, 0.0] in [candidate["weights"] for candidate in report["candidates"]]


def test_fisher_file_says_how_it_was_made(folder: Path) -> None:
    fisher = fk.DiagFisher.load(fishers(folder)[0])
    assert fisher.meta["sampler"] == "topk" and fisher.meta["k"] == 5
    assert fisher.meta["num_sequences"] == 40


def test_data_prints_and_stores_counts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "--data", str(folder / "data.txt"), "--out", str(tmp_path)]) == 0
    assert "users        40" in capsys.readouterr().out
    assert read_json(tmp_path / "result.json")["items"] == 30


def make_bad_files(folder: Path, tmp_path: Path) -> None:
    """Data files and checkpoints, each wrong in one way."""
    texts = {
        "empty": "",
        "word": "1 1\n1 2\n1 x\n",
        "short": "1 1\n1 2\n1 3\n2 1\n",
        "negative": "1 1\n1 2\n1 -3\n",
        "column": "1 1\n1 2 9\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    first = members(folder)[0]
    model = fk.load_model(first)
    wide = fk.BERT4Rec(model.num_items, max_len=6, dim=16)
    wide.item_ids = model.item_ids
    fk.save_model(wide, tmp_path / "wide.safetensors")
    with torch.no_grad():
        model.get_parameter("output_bias")[3] = torch.nan
    fk.save_model(model, tmp_path / "nan.safetensors")
    for name, ids in (("other", [f"new {v}" for v in range(12)]), ("nameless", None)):
        other = fk.BERT4Rec(12, max_len=6, dim=8)
        other.item_ids = ids
        fk.save_model(other, tmp_path / f"{name}.safetensors")
    whole = Path(first).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "hostile.safetensors").write_bytes(b"\xff" * 64)


def make_bad_input(folder: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> (arguments, what the one line must name)."""
    make_bad_files(folder, tmp_path)
    data, (m1, m2), (f1, f2) = str(folder / "data.txt"), members(folder), fishers(folder)

    def read(name: str) -> list[str]:
        return ["evaluate", m1, "--data", str(tmp_path / f"{name}.txt")]

    def checkpoint(name: str) -> str:
        return str(tmp_path / f"{name}.safetensors")

    fisher, merge = ["fisher", m1, "--data", data], ["merge", m1]
    return {
        "missing file": (read("none"), "none.txt"),
        "no data": (["evaluate", m1], "--data"),
        "empty file": (read("empty"), "empty.txt"),
        "non-numeric id": (read("word"), "word.txt:3"),
        "user with one item": (read("short"), "short.txt:4"),
        "item id out of range": (read("negative"), "negative.txt:3"),
        "malformed line": (read("column"), "column.txt:2"),
        "K larger than the catalogue": ([*fisher, "--k", "31"], "k: 31 items of a catalogue of 30"),
        "unknown sampler": ([*fisher, "--sampler", "topp"], "sampler: 'topp'"),
        "unknown option": ([*fisher, "--sampel", "topk"], "--sampel"),
        "checkpoint of another catalogue": (
            ["evaluate", checkpoint("other"), "--data", data],
            "item '1' and 29 more are not in the other catalogue of 12",
        ),
        "checkpoint without item ids": (
            ["evaluate", checkpoint("nameless"), "--data", data],
            "nameless.safetensors: its catalogue",
        ),
        "different shapes": ([*merge, checkpoint("wide")], "item_embedding"),
        "Fisher of another model": ([*merge, m2, "--fisher", f2, f1], "another model"),
        "one Fisher for two members": ([*merge, m2, "--fisher", f1], "fishers"),
        "truncated safetensors": ([*merge, checkpoint("cut")], "cut.safetensors"),
        "hostile header": ([*merge, checkpoint("hostile")], "hostile"),
        "NaN in a member": ([*merge, checkpoint("nan")], "output_bias"),
        "weights that are no numbers": ([*merge, m2, "--weights", "a,b"], "--weights"),
        "search without data": ([*merge, m2, "--weights", "search"], "--data"),
    }


BAD = [
    "missing file",
    "no data",
    "empty file",
    "non-numeric id",
    "user with one item",
    "item id out of range",
    "malformed line",
    "K larger than the catalogue",
    "unknown sampler",
    "unknown option",
    "checkpoint of another catalogue",
    "checkpoint without item ids",
    "different shapes",
    "Fisher of another model",
    "one Fisher for two members",
    "truncated safetensors",
    "hostile header",
    "NaN in a member",
    "weights that are no numbers",
    "search without data",
]


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, named = make_bad_input(folder, tmp_path)[name]
    out = tmp_path / "out"
    capsys.readouterr()
    status = main([*arguments, "--quiet", "--out", str(out)])
    found = capsys.readouterr()
    assert status == 2
    assert named in found.err and found.err.count("\n") == 1, found.err
    assert not out.exists() or not list(out.iterdir())


def test_list_of_bad_input_is_whole(folder: Path, tmp_path: Path) -> None:
    assert set(BAD) == set(make_bad_input(folder, tmp_path))


def run(arguments: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fisherkern", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,  # type: ignore[call-overload]
    )


def test_as_a_process(folder: Path, tmp_path: Path) -> None:
    good = run(["data", "--data", str(folder / "data.txt"), "--out", str(tmp_path)])
    assert good.returncode == 0 and "fingerprint" in good.stdout, good.stderr
    bad = run(["evaluate", str(tmp_path / "no.safetensors"), "--data", str(folder / "data.txt")])
    assert bad.returncode == 2
    assert bad.stderr == f"fisherkern evaluate: {tmp_path / 'no.safetensors'}: no such file\n"


def test_full_disk(folder: Path, tmp_path: Path) -> None:
    """Writing stops at 4 KB, as on a full disk: one line, and the old files as they were."""
    out = tmp_path / "out"
    arguments = ["merge", *members(folder), "--out", str(out)]
    assert run(arguments).returncode == 0
    before = {path: path.read_bytes() for path in out.iterdir()}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    arguments += ["--weights", "0.9,0.1"]
    full = run(arguments, preexec_fn=limit)
    assert full.returncode == 2
    assert "merged.safetensors: could not be written" in full.stderr
    assert full.stderr.count("\n") == 1, full.stderr
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("command", ["demo", "train", "fisher", "merge", "evaluate", "data"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--data", "--out", "--seed"))
