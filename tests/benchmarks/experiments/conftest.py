"""Fixtures of the experiments' tests: the data sets and what a refusal looks like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import fisherkern as fk
from benchmarks.experiments.__main__ import main
from fisherkern.data import write_seqrec

MakeData = Callable[[int, int], str]
ReadFiles = Callable[[Path], dict[str, bytes]]
AssertRefused = Callable[[list[str], str], None]


@pytest.fixture(scope="session")
def make_data(tmp_path_factory: pytest.TempPathFactory) -> MakeData:
    """(users, items) -> the path of a data set of that size."""

    def make(users: int, items: int) -> str:
        path = tmp_path_factory.mktemp("data") / "small.txt"
        write_seqrec(fk.synthetic(users, items, clusters=8), path)
        return str(path)

    return make


@pytest.fixture(scope="session")
def small(make_data: MakeData) -> str:
    """A data set of 60 users and 40 items."""
    return make_data(60, 40)


@pytest.fixture(scope="session")
def files() -> ReadFiles:
    """folder -> the content of every file in it by its path there."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return read


@pytest.fixture
def assert_refused(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AssertRefused:
    """A command must end with status 2 and one line that holds the message, and write nothing."""

    def check(arguments: list[str], message: str) -> None:
        out = tmp_path / "out"
        try:
            status = main([*arguments, "--data", small, "--out", str(out)])
        except SystemExit as exit:  # argparse's own
            status = int(exit.code or 0)
        printed = capsys.readouterr().err
        assert status == 2 and message in printed and printed.count("\n") == 1
        assert not out.exists()

    return check
