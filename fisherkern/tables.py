"""Tables of rows: by rich on a terminal, as aligned text in a log, as Markdown in a file."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fisherkern.errors import one_line

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

    heads, cells, numeric = table_cells(rows, digits)
    table = Table()
    for head, right in zip(heads, numeric, strict=True):
        table.add_column(head, justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)


def plain_table(rows: TableRows, *, digits: str = ".4f") -> str:
    """Aligned columns two spaces apart, numbers to the right."""
    heads, cells, numeric = table_cells(rows, digits)
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
    """Make a Markdown table, numbers to the right; what cells hold is text, see `escaped`."""
    heads, cells, numeric = table_cells(rows, digits)
    lines = [
        _row([escaped(head) for head in heads]),
        "|" + "|".join("---:" if right else "---" for right in numeric) + "|",
    ]
    for row, texts in zip(rows, cells, strict=True):
        code = [isinstance(row[head], Code) for head in rows[0]]
        lines.append(
            _row([f"`{t}`" if c else escaped(t) for t, c in zip(texts, code, strict=True)])
        )
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """Return `text` as Markdown and HTML show it and never read it: on one line, no link."""
    text = one_line(text).translate(_SPECIAL).replace("://", ":&#47;/")
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # not those of max_len


_SPECIAL = str.maketrans(
    {char: f"\\{char}" for char in "\\`*[]|#~$"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
)


class Code(str):
    """Text of a cell that Markdown shows as code, as it is: letters and digits alone."""

    __slots__ = ()


def table_cells(rows: TableRows, digits: str) -> tuple[list[str], list[list[str]], list[bool]]:
    """Heads, cells as text, and which columns hold numbers alone."""
    heads = list(rows[0])
    numeric = [
        all(isinstance(row[head], int | float) and not isinstance(row[head], bool) for row in rows)
        for head in heads
    ]
    cells = [
        [
            format(value, digits) if isinstance(value, float) else one_line(str(value))
            for value in (row[head] for head in heads)
        ]
        for row in rows
    ]
    return [one_line(str(head)) for head in heads], cells, numeric
