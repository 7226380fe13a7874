"""The small cases and `python -m benchmarks.speed`: what is slower or gone fails the comparison."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.speed import __main__ as speed
from benchmarks.speed import instructions
from benchmarks.speed.small_cases import CASES
from fisherkern import ops


def test_every_op_has_a_case() -> None:
    functions = {name for name in ops.__all__ if name.islower()}
    assert functions - {"lookup_segments"} <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_case_can_be_called_again(name: str) -> None:
    call = CASES[name]()
    call()
    call()


def test_what_is_slower_or_gone_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "fisherkern"
    shutil.copytree(
        speed.ROOT / "fisherkern", package, ignore=shutil.ignore_patterns("__pycache__")
    )
    with (package / "ops/__init__.py").open("a") as file:
        file.write("\ndel softmax_mean\n")
    with (package / "__init__.py").open("a") as file:
        # Reading a file twenty times takes more than 1.5 times as long.
        file.write("\nonce = load\ndef load(path): return [once(path) for _ in range(20)][0]\n")
    rows = speed.compare(speed.ROOT, tmp_path, ["load", "softmax_mean"], speed.LIMIT)
    assert speed.failed(rows, speed.LIMIT) == ["load", "softmax_mean"]
    assert rows[0]["ratio"] > 5 and "softmax_mean" in rows[1]["now"]
    shown = capsys.readouterr().out
    assert "SLOWER" in shown and "not run by now: AttributeError" in shown
    # A case that is new has nothing to be compared with.
    assert speed.failed([{"case": "new", "base": "AttributeError"}], speed.LIMIT) == []


def test_a_revision_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(["--base", "no-such-revision"]) == 2
    assert "--base: 'no-such-revision' is no revision" in capsys.readouterr().err


def test_instructions_need_valgrind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert speed.main(["--base", "HEAD", "--instructions"]) == 2
    assert "--instructions: needs valgrind and a C compiler" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("valgrind"), reason="needs valgrind")
def test_instructions_are_those_of_the_calls(tmp_path: Path) -> None:
    worker = speed.Worker(speed.ROOT, tmp_path)
    try:
        one, three = (float(worker.cost("softmax_mean", calls)) for calls in (1, 3))
    finally:
        worker.close()
    assert one > 64 * 2000 * 32 / 16  # fewer than one fused product of eight would be too few
    assert one == pytest.approx(three, rel=0.2)  # a call's, not all calls'
