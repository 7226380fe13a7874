"""From a sweep's lines to the launch table: one row changes, and for a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpu_results import Line, checks, folder, today, write

from benchmarks.gpu import launch_rows
from fisherkern.ops import launch_table
from fisherkern.ops.launch_table import Launch

__all__ = ["folder", "today"]  # fixtures


@pytest.fixture
def table(folder: Path) -> Path:
    """A copy of launch_table.py, and a run with lines of checks."""
    write(folder, "check", checks())
    path = folder / "launch_table.py"
    path.write_text(Path(launch_table.__file__).read_text(encoding="utf-8"))
    return path


def swept(setting: Launch, ms: float, registers: int = 100, **more: Any) -> Line:
    line = {"kernel": "softmax_lse", "kind": "fp32", "D": 64, "N": 4096, "V": 10**6}
    line |= {"registers": registers, "shared": 0, "stack": 0, "p50_ms": ms, "correct": True}
    return line | setting._asdict() | more


A, B, C = Launch(64, 64, 64, 4, 2), Launch(128, 64, 64, 8, 3), Launch(64, 128, 64, 8, 3)


def changed_lines(folder: Path, table: Path) -> list[tuple[str, str]]:
    before = table.read_text()
    launch_rows.main([str(folder)], table)
    pairs = zip(before.splitlines(), table.read_text().splitlines(), strict=True)
    return [pair for pair in pairs if pair[0] != pair[1]]


def test_without_a_sweep_the_table_stays(folder: Path, table: Path) -> None:
    assert changed_lines(folder, table) == []
    keys = {(kernel, arch, kind): row for kernel, arch, kind, row in launch_table.rows_of_table()}
    same = launch_rows.with_rows(table.read_text(), keys)
    assert same == table.read_text()


def test_a_sweep_changes_its_row_and_nothing_else(folder: Path, table: Path, capsys: Any) -> None:
    write(folder, "sweep", [swept(B, 1.0), swept(A, 2.0)])
    ((old, new),) = changed_lines(folder, table)
    assert old.startswith('    ("softmax_lse", 90, "fp32"): Launch(')
    assert new == '    ("softmax_lse", 90, "fp32"): Launch(128, 64, 64, 8, 3),'
    assert changed_lines(folder, table) == []
    assert "decided  softmax_lse sm_90 fp32: (128, 64, 64, 8, 3)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([swept(A, 1.0), swept(B, 1.02, registers=99)], B),  # near, and fewer registers
        ([swept(A, 1.0), swept(B, 1.04, registers=99)], A),
        ([swept(A, 2.0), swept(B, 1.0, correct=False)], A),
        ([swept(A, 2.0), swept(B, 1.0, stack=8)], A),
        ([swept(A, 2.0), swept(B, 1.0), swept(A, 2.0, D=256)], A),  # B was not at D = 256
        ([swept(A, 2.0), swept(B, 1.0), swept(A, 2.0, D=256), swept(B, 9.0, D=256)], A),
        ([swept(A, 2.0), swept(B, 1.0), swept(B, 1.0, correct=False)], A),  # once wrong
        ([swept(A, 1.0, correct=False)], None),
    ],
)
def test_the_setting_chosen(lines: list[Line], expected: Launch | None) -> None:
    assert launch_rows.winner(lines) == expected


def test_what_one_width_alone_would_gain(folder: Path, table: Path, capsys: Any) -> None:
    lines = [swept(A, 2.0), swept(C, 1.0), swept(A, 2.0, D=256), swept(C, 9.0, D=256)]
    write(folder, "sweep", lines)
    launch_rows.main([str(folder)], table)
    said = capsys.readouterr().out
    assert said.endswith("\n         at D = 64 (64, 128, 64, 8, 3) would be 2.00 times as fast\n")


def test_a_sweep_of_another_source_changes_nothing(
    folder: Path, table: Path, capsys: Any, today: dict[str, str]
) -> None:
    write(folder, "sweep", [swept(B, 1.0)])
    hashes = today | {"softmax_lse/triton": "another"}
    (folder / "env.json").write_text(json.dumps({"hashes": hashes}))
    assert changed_lines(folder, table) == []
    said = capsys.readouterr().out
    assert said == "stays    softmax_lse sm_90 fp32: its source has changed since the sweep\n"


def test_a_new_architecture_gets_a_row(table: Path) -> None:
    text = launch_rows.with_rows(table.read_text(), {("softmax_lse", 100, "half"): B})
    new = '    ("softmax_lse", 100, "half"): Launch(128, 64, 64, 8, 3),\n}\n'
    assert text.replace(new, "}\n") == table.read_text()
