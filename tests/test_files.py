"""Files that are whole or absent: what a killed writer leaves behind, and what is not its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fisherkern import files
from fisherkern.errors import InputError
from fisherkern.files import atomic_path, read_json, write_json

WRITER = """
import os, signal, sys
from fisherkern.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print(temporary, flush=True)
    {end}
"""


def start_writer(path: Path, end: str) -> tuple[subprocess.Popen[str], Path]:
    """A process in the middle of writing `path`, and its temporary file."""
    command = [sys.executable, "-c", WRITER.format(end=end), str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    writer = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert writer.stdout is not None
    return writer, Path(writer.stdout.readline().strip())


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    writer, left = start_writer(tmp_path / "a.json", "os.kill(os.getpid(), signal.SIGKILL)")
    assert writer.wait() == -signal.SIGKILL
    writer.communicate()
    assert left.read_text() == "half" and read_json(tmp_path / "a.json") == 1
    # Neither another name's file, nor one of another machine's process, is touched.
    others = [left.with_name(left.name.replace(".a.json.", ".a.json.b."))]
    others += [left.with_name(left.name.replace(files._machine(), "0" * 8)), tmp_path / ".a.json."]
    for other in others:
        other.write_text("")
    write_json(tmp_path / "b.json", 2)
    assert left.exists()
    write_json(tmp_path / "a.json", 3)
    assert not left.exists() and all(other.exists() for other in others)
    assert read_json(tmp_path / "a.json") == 3


def test_a_writer_that_lives_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    writer, temporary = start_writer(path, "sys.stdin.read()")
    with atomic_path(path) as own:
        own.write_text("1")
        write_json(path, 2)  # another write of this process, inside
        assert own.exists()
    assert temporary.exists() and read_json(path) == 1
    writer.communicate("")
    assert writer.returncode == 0 and path.read_text() == "half"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a.json: could not be written: No space left"):
        with atomic_path(tmp_path / "a.json"):
            raise OSError(28, "No space left on device")
    with pytest.raises(InputError, match="could not be written: File exists"):
        (tmp_path / "file").write_text("")
        write_json(tmp_path / "file" / "a.json", 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
