"""Fill the README's tables from the results that scripts wrote: python benchmarks/readme_tables.py

A table stands between `<!-- table: FOLDER/WHAT -->` and `<!-- end -->`, where FOLDER is in
benchmarks/results and WHAT is `result.json` (the story's rows) or `fisher_cost` (time, error);
or WHAT is `fisher.csv`, the latest row of bench_fisher.py for each estimate and size.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from fisherkern.experiments.fisher_cost import cost_table
from fisherkern.experiments.tables import story_table
from fisherkern.files import atomic_path, read_json

HERE = Path(__file__).parent
BLOCK = re.compile(r"(<!-- table: (\S*?)/?([^/\s]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fisher_rows() -> str:
    """bench_fisher.py's rows; the last one counts where an estimate was run again."""
    with (HERE / "results" / "fisher.csv").open(newline="") as stream:
        rows = {(r["sequences"], r["provider"], r["k"]): r for r in csv.DictReader(stream)}
    lines = [
        "| estimate | K or R | sequences | time / batch-wise | error, best-scaled |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['provider']} | {k} | {sequences} | {float(row['ratio']):.2f}"
        f" | {float(row['error']):.4f} |"
        for (sequences, _, k), row in rows.items()
    ]
    return "\n".join(lines)


def table(match: re.Match[str]) -> str:
    if match[3] == "fisher.csv":
        return f"{match[1]}{fisher_rows()}\n{match[4]}"
    result = read_json(HERE / "results" / match[2] / "result.json")
    if match[3] == "fisher_cost":
        text = cost_table(result["fisher_cost"])
    else:
        text = story_table(result["rows"], result["protocol"])
    return f"{match[1]}{text}\n{match[4]}"


def main() -> None:
    readme = HERE.parent / "README.md"
    text = BLOCK.sub(table, readme.read_text(encoding="utf-8"))
    with atomic_path(readme) as path:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
