"""The share of the fuzzer that every change must pass: under 90 seconds on two cores."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.readers import READERS
from tests.fuzz.run import CORPUS, Findings, check, fuzz

ROOT = Path(__file__).parents[2]

BOMB = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
# Whole files that once gave a traceback, or never an end, in a reader or another.
HOSTILE = {
    "nothing": b"",
    "zeros": bytes(1000),
    "deep arrays": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "bomb": BOMB.encode(),
    "half a pair": b'{"a": "\\ud800"}',
    "NaN": b'{"a": NaN, "b": Infinity}',
    "twice": b'{"a": 1, "a": 2}',
    "utf-16": "user_id,item_id\n1,2\n".encode("utf-16"),
    "a header of zeros": (1 << 40).to_bytes(8, "little") + b"{" * 100,
    "a header of deep arrays": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "opening quote": b'user_id,item_id,timestamp\n1,2,3\n1,"2,3\n' + b"1,2,3\n" * 4000,
    "gzip cut short": bytes.fromhex("1f8b08000000000000ff4bcc"),
}


def made(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Make the whole files of a reader, once."""
    if name not in _made:
        folder = tmp_path_factory.mktemp("whole")
        _made[name] = folder, READERS[name].make(folder)
    return _made[name]


_made: dict[str, tuple[Path, list[str]]] = {}


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read_and_hostile_ones_refused(name, tmp_path_factory, tmp_path):
    whole, files = made(name, tmp_path_factory)
    findings = Findings()
    assert check(name, shutil.copytree(whole, tmp_path / "whole"), findings) is None
    assert findings.counts["read"] == 1
    for number, (case, content) in enumerate(HOSTILE.items()):
        for file in dict.fromkeys(files):
            folder = shutil.copytree(whole, tmp_path / f"{number} {file.replace('/', ' ')}")
            (folder / file).write_bytes(content)
            assert check(name, folder, findings) is None, (case, file)


def corpus() -> list[Path]:
    return sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", corpus(), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_inputs_that_once_failed(path, tmp_path_factory, tmp_path):
    name, file = path.parent.name, path.name.partition("--")[2].replace("--", "/")
    folder = shutil.copytree(made(name, tmp_path_factory)[0], tmp_path / "work")
    shutil.copy(path, folder / file)
    assert check(name, folder, Findings()) is None


@pytest.mark.parametrize("half", [0, 1])
def test_mutated_inputs_of_every_reader(half):
    found = fuzz(list(READERS)[half::2], 200, seed=0, seconds=12, keep=False)
    assert not found.faults, "\n\n".join(found.faults)
    assert found.counts["all"] > 100 and found.counts["refused"] > 50


def test_a_fault_is_seen(monkeypatch, tmp_path):
    """The fuzzer itself: an exception, a file left behind, a hang and a long message."""

    def left(folder):
        (folder / "left").touch()

    def spin(folder):
        while True:
            pass

    def loud(folder):
        raise KeyError("x")

    for read, said in ((left, "left"), (loud, "KeyError"), (spin, "TooLongError")):
        monkeypatch.setitem(READERS, "own", READERS["recipe"].__class__(lambda _: [], read))
        monkeypatch.setattr("tests.fuzz.run.SECONDS", 1)
        fault = check("own", tmp_path, Findings())
        assert fault is not None and said in fault
        (tmp_path / "left").unlink(missing_ok=True)


def test_killed_commands_end_in_the_same_bits():
    """Six commands killed by SIGKILL and SIGINT; then four processes at once on one folder."""
    words = [sys.executable, "-m", "tests.fuzz.kills", "--kills", "6"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
