"""Lines of the package that the tests run, by folder: make coverage

Appends what pytest-cov found to benchmarks/results/coverage.csv, a row for each folder.

    python -m benchmarks.coverage_by_folder build/coverage.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from benchmarks.common import append
from benchmarks.figures import read_rows
from fisherkern.files import read_json

COLUMNS = ("folder", "files", "statements", "run")


def by_folder(files: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Files, statements, and statements that ran, of each folder."""
    found: dict[str, dict[str, Any]] = {}
    for name, file in sorted(files.items()):
        folder = "/".join(PurePath(name).parts[:-1][:2])
        row = found.setdefault(folder, {"folder": folder, "files": 0, "statements": 0, "run": 0})
        row["files"] += 1
        row["statements"] += file["summary"]["num_statements"]
        row["run"] += file["summary"]["covered_lines"]
    return list(found.values())


def coverage_rows(**chosen: str) -> str:
    """Return the latest run's rows as a table."""
    rows = read_rows("coverage", **chosen)
    rows = [row for row in rows if row["date"] == rows[-1]["date"]]
    lines = ["| folder | files | statements | run by the tests |", "|---|---:|---:|---:|"]
    for row in rows:
        share = int(row["run"]) / max(1, int(row["statements"]))
        lines.append(f"| `{row['folder']}` | {row['files']} | {row['statements']} | {share:.1%} |")
    total = sum(int(row["run"]) for row in rows) / sum(int(row["statements"]) for row in rows)
    return "\n".join([*lines, f"| all | | | {total:.1%} |"])


def main(argv: list[str] | None = None) -> None:
    (path,) = sys.argv[1:] if argv is None else argv
    append("coverage", by_folder(read_json(Path(path))["files"]))


if __name__ == "__main__":
    main()
