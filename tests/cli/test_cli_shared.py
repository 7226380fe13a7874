"""Options that every command takes, refused before any work is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from fisherkern.cli import main


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--threads", "0"], "--threads: must be from 1 to 64, got 0"),
        (["--out", "{folder}/file"], "{folder}/file: no folder can be written there"),
        (["--out", "{folder}/file/in/it"], "{folder}/file/in/it: no folder can be written there"),
    ],
)
@pytest.mark.parametrize(
    "command", [["evaluate", "no.safetensors"], ["fisher", "no.safetensors"], ["train"], ["demo"]]
)
def test_refused_before_any_work(
    command: list[str],
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("not a folder")
    given = [argument.format(folder=tmp_path) for argument in arguments]
    assert main([*command, *given]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"fisherkern {command[0]}: {said.format(folder=tmp_path)}\n"
    assert printed.out == ""
