"""Tables of rows: by rich on a terminal, as aligned text in a log, as Markdown in a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

TableRows = Sequence[Mapping[str, Any]]


def print_table(rows: TableRows, *, digits: str = ".4f") -> None:
    """Print rows with the keys of the first as heads.

    Args:
        rows: mappings with the same keys.
        digits: format of floating-point numbers.
    """
    if not sys.stdout.isatty():
        print(plain_table(rows, digits=digits))
        return
    from rich.console import Console
    from rich.table import Table

    heads, cells, numeric = _cells(rows, digits)
    table = Table()
    for head, right in zip(heads, numeric, strict=True):
        table.add_column(head, justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)


def plain_table(rows: TableRows, *, digits: str = ".4f") -> str:
    """Aligned columns two spaces apart, numbers to the right."""
    heads, cells, numeric = _cells(rows, digits)
    lines = [heads, *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def markdown_table(rows: TableRows, *, digits: str = ".6g") -> str:
    """Make a Markdown table, numbers to the right; a pipe in a cell is escaped."""
    heads, cells, numeric = _cells(rows, digits)
    lines = [_row(heads), "|" + "|".join("---:" if right else "---" for right in numeric) + "|"]
    return "\n".join([*lines, *(_row([_escaped(text) for text in row]) for row in cells)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _cells(rows: TableRows, digits: str) -> tuple[list[str], list[list[str]], list[bool]]:
    """Heads, cells as text, and which columns hold numbers alone."""
    heads = list(rows[0])
    numeric = [
        all(isinstance(row[head], int | float) and not isinstance(row[head], bool) for row in rows)
        for head in heads
    ]
    cells = [
        [
            format(value, digits) if isinstance(value, float) else str(value)
            for value in (row[head] for head in heads)
        ]
        for row in rows
    ]
    return [str(head) for head in heads], cells, numeric
