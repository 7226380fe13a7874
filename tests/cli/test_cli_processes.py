"""Commands under torchrun: one process's files and tables, written once; one line for a fault."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from process_runs import DATA, member, set_environment, start

import fisherkern as fk
from fisherkern.adapters.files.dcp_files import DcpFolder
from fisherkern.cli import main
from fisherkern.files import read_tensors

A, B = "a.safetensors", "b.safetensors"
FROM_DATA = ("--data", "data.txt", "--batch-size", "9")
COMMANDS: dict[str, list[str]] = {
    "evaluate": ["evaluate", A, "--against", B, *FROM_DATA],
    "fisher": ["fisher", A, *FROM_DATA, "--sampler", "sketch"],
    "preflight": ["preflight", A, B, *FROM_DATA],
    "align": ["align", A, B, "--by", "activations", *FROM_DATA],
    "learned": ["merge", A, B, "--method", "learned_soup", "--steps", "3", *FROM_DATA],
    "searched": ["merge", A, B, "--method", "greedy_soup", *FROM_DATA],
    "regmean": ["merge", A, B, "--method", "regmean", *FROM_DATA],
    "streamed": ["merge", A, B, "--stream"],
    "evaluate a folder": ["evaluate", "a.dcp", *FROM_DATA],
    "fisher of a folder": ["fisher", "a.dcp", *FROM_DATA, "--sampler", "topk"],
    "merge folders": ["merge", "a.dcp", "b.dcp", "--weights", "1,3"],
    "repair": ["repair", A, "--members", A, B, *FROM_DATA],
}
# By rows of the item table -> the command that reads all of it.
SHARDED = {
    "evaluate by rows": ("evaluate a folder", ["evaluate", "a.dcp", *FROM_DATA, "--shard"]),
    "fisher by rows": ("fisher of a folder", [*COMMANDS["fisher of a folder"], "--shard"]),
}
FAULTS = {
    "file by rows": (["evaluate", A, "--data", "data.txt", "--shard"], "the rows of a folder, x"),
    "factors by rows": (["fisher", "a.dcp", "--factored", "9", "--shard"], "--factored: does not"),
    "alone": (["data", "--data", "data.txt"], "takes one process, and torchrun started 2"),
    "differs": (["evaluate", A, "--data", "data.txt", "--k", "RANK"], "arguments: process"),
    "theirs": (["merge", A, B, "--out", "theirs"], "did not make it"),
    "missing": (["evaluate", "none.safetensors", "--data", "data.txt"], "no such file"),
    "cut": (["merge", "a.dcp", "cut.dcp"], "__0_0.distcp: the shard is cut short"),
    "shardless": (["evaluate", "shardless.dcp", "--data", "data.txt"], "the shard is missing"),
    "full": (["merge", A, B, "--out", "full"], "could not be written"),
}


def prepare(folder: Path) -> None:
    for name, seed in ((A, 1), (B, 2)):
        fk.save_model(member(seed, torch.float32), folder / name)
        fk.save_model(member(seed, torch.float32), (folder / name).with_suffix(".dcp"))
    for name in ("cut", "shardless"):
        shutil.copytree(folder / "a.dcp", folder / f"{name}.dcp")
    os.truncate(folder / "cut.dcp" / "__0_0.distcp", 99)
    (folder / "shardless.dcp" / "__0_0.distcp").unlink()
    lines = [
        f"{DATA.user_ids[user]} {DATA.item_ids[item - 1]}"
        for user in range(DATA.num_users)
        for item in DATA.sequence(user)
    ]
    (folder / "data.txt").write_text("\n".join(lines))
    (folder / "theirs").mkdir()
    (folder / "theirs" / "merged.safetensors").write_text("somebody's")


def run(words: list[str]) -> dict[str, Any]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main([*words, "--quiet"])
    return {"status": status, "out": out.getvalue(), "error": error.getvalue()}


def commands(rank: int, world: int, folder: Path, ports: list[int]) -> None:
    os.chdir(folder)
    found = {}
    several = COMMANDS | {name: words for name, (_, words) in SHARDED.items()}
    for name, words in several.items():
        set_environment(rank, world, ports.pop())
        found[name] = run([*words, "--out", f"two/{name}"])
    for name, (words, _) in FAULTS.items():
        set_environment(rank, world, ports.pop())
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if name == "full" and rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, unlimited[1]))
        found[name] = run([str(1 + rank) if word == "RANK" else word for word in words])
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    (folder / f"{rank}.json").write_text(json.dumps(found))


def free_ports(count: int) -> list[int]:
    """Different ports; a row of neighbours would soon hold one that is taken."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for own in sockets:
            own.bind(("127.0.0.1", 0))
        return [int(own.getsockname()[1]) for own in sockets]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes ran all commands, and one process after them."""
    folder = tmp_path_factory.mktemp("commands")
    prepare(folder)
    ports = free_ports(len(COMMANDS) + len(SHARDED) + len(FAULTS))
    assert start(2, commands, folder, ports) == [0, 0]
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)  # as theirs: what rounding leaves is printed too
    try:
        found = {name: run([*words, "--out", f"one/{name}"]) for name, words in COMMANDS.items()}
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
    (folder / "one.json").write_text(json.dumps(found))
    return folder


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(DcpFolder(path)) if path.suffix == ".dcp" else read_tensors(path)[0]


def told(folder: Path, who: str, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{who}.json").read_text())[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_by_two_processes_is_that_by_one(folder: Path, name: str) -> None:
    one, first, second = (told(folder, who, name) for who in ("one", "0", "1"))
    assert [one["status"], first["status"], second["status"]] == [0, 0, 0], first["error"]
    assert first["out"].replace("two/", "one/") == one["out"]
    assert second["out"] == second["error"] == ""
    made = sorted(os.listdir(folder / "one" / name))
    assert sorted(os.listdir(folder / "two" / name)) == made
    for file in made:
        if file.endswith((".safetensors", ".dcp")):
            expected, found = (tensors(folder / who / name / file) for who in ("one", "two"))
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                bound = 1e-6 * float(value.abs().max())
                assert float((found[key] - value).abs().max()) <= bound, key


@pytest.mark.parametrize("name", SHARDED)
def test_tables_by_rows_give_what_whole_ones_give(folder: Path, name: str) -> None:
    whole, _ = SHARDED[name]
    one, first, second = (
        told(folder, "one", whole),
        told(folder, "0", name),
        told(folder, "1", name),
    )
    assert [first["status"], second["status"]] == [0, 0], first["error"]
    assert second["out"] == second["error"] == ""
    if whole.startswith("evaluate"):
        assert first["out"].replace("two/", "one/") == one["out"]
        return
    assert "a.fisher.dcp" in first["out"]
    expected = tensors(folder / "one" / whole / "a.fisher.safetensors")
    found = tensors(folder / "two" / name / "a.fisher.dcp")
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        # A key's bias has no Fisher but what rounding leaves.
        bound = max(1e-12, 1e-6 * float(value.abs().max()))
        assert float((found[key] - value).abs().max()) <= bound, key


def test_one_process_has_no_rows_to_share(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(folder / "a.dcp"), "--data", str(folder / "data.txt"), "--shard"]
    assert main([*words, "--out", str(folder / "alone")]) == 2
    assert "--shard: shares rows among processes" in capsys.readouterr().err


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_of_every_process(folder: Path, name: str) -> None:
    for rank in ("0", "1"):
        said = told(folder, rank, name)
        assert said["status"] == 2 and said["out"] == ""
        assert FAULTS[name][1] in said["error"] and said["error"].count("\n") == 1
    assert (folder / "theirs" / "merged.safetensors").read_text() == "somebody's"
    assert not [file for file in (folder / "full").glob("*") if file.stat().st_size > 2048]
    assert not list((folder / "full").glob("merged*"))


KILLED = """
import os, signal
import fisherkern as fk
from process_runs import batches, member

def made():
    model = member(1)
    if os.environ["RANK"] == "1":
        model.encode = lambda batch: os.kill(os.getpid(), signal.SIGKILL)
    return model, list(batches())
"""


def test_a_process_killed_under_torchrun_ends_the_other_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "fisherkern", "fisher", "--model", "killed:made"]
    done = subprocess.run(
        [*command, "--out", "out", "--quiet"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("fisherkern")]
    ours = [line for line in ours if not line.endswith("FAILED")]
    assert len(ours) == 1, done.stderr
    assert "another process ended" in ours[0]
    assert not list((tmp_path / "out").glob("*.safetensors"))
