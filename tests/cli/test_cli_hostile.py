"""Arguments that no run can have: one line, status 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.data import write_seqrec
from fisherkern.files import read_json

TRAIN = "train --data {data} --quiet --epochs 1 --dim 8 --layers 1 --max-len 6 --out {out} "
FISHER = "fisher {folder}/m.safetensors --data {data} --quiet --out {out} "
MERGE = "merge {folder}/m.safetensors {folder}/m.safetensors --out {out} "
SURGERY = (
    "representation-surgery {folder}/m.safetensors --members {folder}/m.safetensors "
    "{folder}/m.safetensors --data {data} --quiet --out {out} "
)
LONG = "a" * 300
REFUSED = {
    "out of 300 bytes": (f"data --data {{data}} --out {{out}}/{LONG}", "File name too long"),
    "out inside a long name": (f"data --data {{data}} --out {{out}}/{LONG}/b", "too long"),
    "checkpoint of 300 bytes": (f"fisher {LONG}.safetensors --data {{data}}", "too long"),
    "member of 5000 bytes": (f"merge {'a/' * 2500} b --out {{out}}", "too long"),
    "init of 300 bytes": (TRAIN + f"--init {LONG}.safetensors", "too long"),
    "data of 300 bytes": (f"data --out {{out}} --data {LONG}.csv", "too long"),
    "data name of 300 bytes": (f"data --out {{out}} --data {LONG}", "too long"),
    "config of 300 bytes": (TRAIN + f"--config {LONG}", "too long"),
    "recipe of 300 bytes": (f"merge --recipe {LONG} --out {{out}}", "too long"),
    "log folder of 300 bytes": (TRAIN + f"--log-dir {LONG}", "too long"),
    "log folder a file": (TRAIN + "--log-dir {data}", "no folder can be written there"),
    "log folder in a file": (TRAIN + "--log-dir {data}/a/b", "no folder can be written there"),
    "out a file": ("data --data {data} --out {data}", "no folder can be written there"),
    **{
        f"device {name}": (FISHER + f"--device {name}", "--device:")
        for name in ("meta", "mps", "xpu", "cuda:99", "cuda:-1", "cpu:3", "", "privateuseone")
    },
    "train on meta": (TRAIN + "--device meta", "--device: 'meta' is not like cpu"),
    "threads": (TRAIN + "--threads 100000", "--threads: must be from 1 to"),
    "threads 10^30": (TRAIN + f"--threads {10**30}", "--threads: must be below 2^31"),
    "seed of 24 digits": (TRAIN + f"--seed {10**23}", "--seed: must be below 2^63"),
    "seed of 5000 digits": (TRAIN + f"--seed {'9' * 5000}", "seed"),
    "seed -1": (FISHER + "--seed -1", "--seed: must not be negative"),
    "merge seed -1": (MERGE + "--seed -1", "--seed: must not be negative"),
    **{
        f"{flag} {size}": (TRAIN + f"--{flag} {size}", flag[:3])
        for flag in ("dim", "layers", "max-len", "heads", "inner-dim")
        for size in (10**12, 10**6, -1, 0)
    },
    "window": (TRAIN.replace("--layers 1", "") + "--encoder Caser --window 1000000", "window"),
    "dim times inner": (TRAIN + "--dim 65536 --inner-dim 65536 --layers 900", "needs about"),
    "networks": (TRAIN + "--networks 100000", "networks"),
    "rank": (SURGERY + "--rank 1000000000000", "rank"),
    **{
        f"{flag} {number}": (TRAIN + f"--{flag} {number}", flag)
        for flag in ("init-std", "clip", "weight-decay", "lr", "dropout", "mask-ratio",
                     "save-every-seconds", "ema", "noise", "contrastive-weight")
        for number in ("nan", "inf", "-inf")
    },
    "init-std negative": (TRAIN + "--init-std -1", "init_std"),
    "objective NaN": (TRAIN + '--objective {{"name":"masked_items","ratio":NaN}}', "NaN"),
    "objective deep": (TRAIN + "--objective " + '{{"a":' * 5000, "nested too deep"),
    "floor nan": (MERGE + "--floor nan", "floor"),
    "option bomb": (MERGE + "--option density=" + "[" * 5000, "nested deeper"),
    "k": (FISHER + f"--k {10**30}", "k"),
    "limit": (FISHER + f"--limit {10**30}", "limit"),
    "score": (TRAIN + f"--patience 1 --score ndcg@{'9' * 50}", "--score"),
    "zero byte": ("data --out {out} --data a\0b.txt", "a\\x00b.txt"),
    "newline": ("data --out {out} --data a\nb.txt", r"a\nb.txt: no such file"),
    "escape": ("data --out {out} --data a\x1b[2Jb.txt", r"a\x1b[2Jb.txt: no such file"),
    "pipe as config": (TRAIN + "--config {folder}/pipe", "not a regular file"),
    "pipe as recipe": ("merge --recipe {folder}/pipe --out {out}", "not a regular file"),
    "zeros as config": (TRAIN + "--config /dev/zero", "not a regular file"),
    "zeros as recipe": ("merge --recipe /dev/zero --out {out}", "not a regular file"),
    "pipe as data": ("data --data {folder}/pipe --out {out}", "not a"),
    "pipe as a member": ("merge {folder}/pipe.safetensors {folder}/m.safetensors --out {out}",
                         "not a regular file"),
    "pipe streamed": ("merge {folder}/m.safetensors {folder}/pipe.safetensors --stream --out {out}",
                      "not a regular file"),
    "pipe as init": (TRAIN + "--init {folder}/pipe.safetensors", "not a regular file"),
    "folder as a recipe": ("merge --recipe {folder} --out {out}", "not a regular file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    data = fk.synthetic(40, 30, clusters=8)
    write_seqrec(data, folder / "data.txt")
    data = fk.load(folder / "data.txt")
    torch.manual_seed(0)
    model = fk.BERT4Rec(data.num_items, max_len=6, dim=8, layers=1)
    model.item_ids = list(data.item_ids)
    fk.save_model(model, folder / "m.safetensors")
    for name in ("pipe", "pipe.safetensors"):
        os.mkfifo(folder / name)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_nothing_left(case, folder, tmp_path, monkeypatch, capsys):
    text, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    words = [w.format(folder=folder, data=folder / "data.txt", out=out) for w in text.split(" ")]
    started = time.process_time()
    assert main([word for word in words if word or "device" in case]) == 2
    assert time.process_time() - started < 20
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.count("\n") == 1 and len(printed.err) < 1200, printed.err
    assert printed.err[:-1].isprintable() and message in printed.err, printed.err
    assert not list(tmp_path.iterdir())


def test_what_was_used_is_stored_beside_a_recipe(folder, tmp_path, capsys):
    """--seed 0, --limit 1 and the like count as given, whatever truth they have."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"members: [{folder}/m.safetensors, {folder}/m.safetensors]\nseed: 5\n")
    out = tmp_path / "out"
    run = ["merge", "--recipe", str(recipe), "--out", str(out)]
    assert main(run) == 0
    assert read_json(out / "result.json")["used"]["seed"] == 5
    assert main([*run, "--seed", "0"]) == 0
    result = read_json(out / "result.json")
    assert result["used"]["seed"] == 0
    assert result["used"]["floor"] == 0.1
    for flag in ("--floor 0", "--steps 0", "--weights 0,1", "--no-check-fingerprint"):
        capsys.readouterr()
        assert main([*run, *flag.split()]) == 2
        assert "the --recipe says it" in capsys.readouterr().err
    # What was stored can be run again.
    before = (out / "merged.safetensors").read_bytes()
    assert main(["merge", "--config", str(out / "result.json")]) == 0
    assert (out / "merged.safetensors").read_bytes() == before
    assert read_json(out / "result.json")["used"]["seed"] == 0
    # The same through a configuration file.
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"recipe": str(recipe), "floor": 0.0, "out": str(out)}))
    assert main(["merge", "--config", str(config)]) == 2
    config.write_text(json.dumps({"recipe": str(recipe), "seed": 0, "out": str(out)}))
    assert main(["merge", "--config", str(config)]) == 0
    assert read_json(out / "result.json")["used"]["seed"] == 0


@pytest.mark.parametrize(
    ("command", "again"), [("train", True), ("demo", True), ("fisher", False), ("merge", False)]
)
def test_who_interrupts_is_told_the_truth(command, again, folder, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fisherkern.cli.run.load", interrupted)
    monkeypatch.setattr("fisherkern.cli.run.load_model", interrupted)
    arguments = {"train": TRAIN, "fisher": FISHER, "merge": MERGE, "demo": "demo --out {out}"}
    text = arguments[command].format(folder=folder, data=folder / "data.txt", out=tmp_path / "out")
    assert main(text.split()) == 130
    expected = "; run the same command again to continue" if again else ""
    assert capsys.readouterr().err == f"interrupted{expected}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", [["-m", "fisherkern"], [str(Path(sys.executable).parent / "fisherkern")]]
)
def test_an_interrupt_during_imports_is_one_line(words, tmp_path):
    if not words[0].startswith("-") and not Path(words[0]).exists():
        pytest.skip("the command is not installed here")
    # The interpreter's own start is not ours: the interrupt comes once torch is being loaded.
    for delay in (0.0, 0.2, 0.5):
        process = subprocess.Popen(
            [sys.executable, *words, "data", "--data", "gone"],
            stderr=subprocess.PIPE, cwd=tmp_path, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(fk.__file__).parents[1])},
        )  # fmt: skip
        mapped = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "libtorch" not in mapped.read_text():
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        # Where the machine was faster than the delay, the command has ended by itself.
        assert (process.returncode, error) == (130, "interrupted\n") or (
            process.returncode == 2 and "gone" in error
        ), (process.returncode, error)


def test_an_import_leaves_the_handlers_of_others_alone():
    code = (
        "import signal; before = signal.getsignal(2); import fisherkern; "
        "assert signal.getsignal(2) is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
