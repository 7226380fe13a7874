"""Tables of rows: aligned text, Markdown, and rich's on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from fisherkern.tables import markdown_table, plain_table, print_table

ROWS = [
    {"model": "a|b", "users": 1200, "ndcg@10": 0.12345, "note": 1},
    {"model": "longer name", "users": 7, "ndcg@10": 1.0, "note": "x"},
]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_columns_of_numbers_stand_to_the_right() -> None:
    assert plain_table(ROWS).splitlines() == [
        "model        users  ndcg@10  note",
        "a|b           1200   0.1235  1",
        "longer name      7   1.0000  x",
    ]
    assert plain_table(ROWS, digits=".1f").splitlines()[1].split() == ["a|b", "1200", "0.1", "1"]


def test_markdown() -> None:
    assert markdown_table(ROWS, digits=".3g").splitlines() == [
        "| model | users | ndcg@10 | note |",
        "|---|---:|---:|---|",
        "| a\\|b | 1200 | 0.123 | 1 |",
        "| longer name | 7 | 1 | x |",
    ]


def test_a_switch_is_no_number() -> None:
    assert markdown_table([{"tied": True, "dim": 8}]).splitlines()[1] == "|---|---:|"


def test_a_log_has_no_boxes(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ROWS)
    assert capsys.readouterr().out == plain_table(ROWS) + "\n"


def test_a_terminal_has_boxes_and_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", terminal)
    print_table([*ROWS, {"model": "[red]m[/red]", "users": 0, "ndcg@10": 0.0, "note": ""}])
    printed = terminal.getvalue()
    assert "┃" in printed and "[red]m[/red]" in printed and "0.1235" in printed
