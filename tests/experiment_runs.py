"""What the tests of `reproduce` share: small data, small sizes, and how a refusal looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.data import write_seqrec

TINY: dict[str, Any] = {"max_len": 8, "dim": 8, "batch_size": 32, "validation_users": 20}


def small_data(factory: pytest.TempPathFactory, users: int, items: int) -> str:
    """The path of a data set of that size."""
    path = factory.mktemp("data") / "small.txt"
    write_seqrec(fk.synthetic(users, items, clusters=8), path)
    return str(path)


def assert_refused(
    arguments: Sequence[str], data: str, out: Path, message: str, capsys: Any
) -> None:
    """`reproduce` ends with status 2 and one line that holds the message, and writes nothing."""
    assert main(["reproduce", *arguments, "--data", data, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not out.exists()
