"""Every architecture through the public functions: python -m benchmarks.libraries.table

The Fisher equals autograd over every item, `merge` the formula, and `evaluate` ranks by hand. A
row of `benchmarks/results/libraries.csv` is one architecture, and `libraries.md` beside it is the
table. `--glue` hands the logits over by hand, which proves the harness rather than the package.
"""

from __future__ import annotations

import argparse
import csv
import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.libraries import checks
from benchmarks.libraries.architecture import Architecture, build_all
from fisherkern.tables import markdown_table

FALLBACK = re.compile(r"no (?:rule|handler) for (.*): (?:a|one) backward")


class FallbackLog(logging.Handler):
    """The parameters that the engine warned of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        found = FALLBACK.match(record.getMessage())
        self.names |= set(found[1].split(", ")) if found else set()


def cell(check: Callable[..., Any], *arguments: Any) -> str:
    """The check's result in a few characters, or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = check(*arguments)
    except Exception as error:
        kind = "" if isinstance(error, checks.Wrong) else f"{type(error).__name__}: "
        return f"NO {kind}{error}".split("\n")[0][:300]
    if result is None:
        return "-"
    return f"{result:.1e}" if isinstance(result, float) else str(result)


def fast_path(entry: Architecture, glue: bool) -> str:
    """Whether "exact" takes fewer passes than items: then a state and a head were found."""
    member = checks.members(entry)[0]
    found = checks.fisher_of(member, member.batches[:1], glue, sampler="exact")
    columns = member.logits(member.module, member.batches[0]).shape[1]
    return "yes" if found.meta["probes"] < columns - 1 else "no"


def row_of(entry: Architecture, glue: bool) -> dict[str, str]:
    """A line of the table; a cell that begins with NO is a failure."""
    try:
        checks.definition(entry)
    except ImportError as error:
        return {"architecture": entry.name, "exact": f"NO {error}"}
    log, logger = FallbackLog(), logging.getLogger("fisherkern")
    logger.addHandler(log)
    row = {
        "architecture": entry.name,
        "exact": cell(checks.fisher_error, entry, "exact", glue),
        "topk": cell(checks.fisher_error, entry, "topk", glue),
        "fast path": cell(fast_path, entry, glue),
    }
    logger.removeHandler(log)
    row["falls back"] = " ".join(sorted(log.names))
    row["other batches"] = cell(checks.more_batches_error, entry, glue)
    if not glue:
        row |= {
            "next items": cell(checks.targets_error, entry),
            "merge": cell(checks.merge_error, entry),
            "preflight": cell(checks.preflight_runs, entry),
            "evaluate": cell(checks.ranks_are_right, entry),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--glue", action="store_true", help="hand the logits over by hand")
    parser.add_argument("--only", default="", help="a part of the architectures' names")
    arguments = parser.parse_args()
    logging.getLogger("fisherkern").setLevel(logging.WARNING)
    rows = []
    for entry in build_all().values():
        if arguments.only.lower() in entry.name.lower():
            rows.append(row_of(entry, arguments.glue))
            print("\n    ".join(f"{n}: {v}" for n, v in rows[-1].items() if v), flush=True)
    if arguments.glue or arguments.only:
        return
    with (RESULTS / "libraries.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(max(rows, key=len)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (RESULTS / "libraries.md").write_text(markdown_table(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
