"""Progress in a log: whole lines now and then; on a terminal tqdm's own bar."""

from __future__ import annotations

import io
import re
import sys

import pytest

from fisherkern import progress
from fisherkern.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_short_loop_is_one_line_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(7), desc="count", unit="step")) == list(range(7))
    printed = capsys.readouterr().err
    assert printed.startswith("count: 7/7 step [") and printed.endswith("]\n")
    assert printed.count("\n") == 1 and "\r" not in printed


def test_lines_come_when_they_are_due(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 20))  # every look at the clock is 20 seconds later
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with progress_bar(total=9, unit="step", mininterval=0) as bar:
        for _ in range(9):
            bar.set_description("epoch 1", refresh=False)
            bar.set_postfix(loss="0.5", refresh=False)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert 1 < len(lines) < 9
    assert all(re.match(r"epoch 1: \d/9 step ", line) for line in lines)
    assert "9/9 step" in lines[-1] and "loss=0.5" in lines[-1]


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert sum(progress_bar(range(3), desc="count")) == 3
    assert "\r" in terminal.getvalue() and "100%" in terminal.getvalue()


def test_nothing_is_shown_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar([1], show=False)) == [1]
    assert capsys.readouterr().err == ""
