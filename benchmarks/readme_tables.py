"""Fill the README's tables from the results that scripts wrote: python benchmarks/readme_tables.py

A table stands between `<!-- table: FOLDER/WHAT -->` and `<!-- end -->`, where FOLDER is in
benchmarks/results and WHAT is `result.json` (the story's rows) or `fisher_cost` (time and error).
"""

from __future__ import annotations

import re
from pathlib import Path

from fisherkern.experiments.fisher_cost import cost_table
from fisherkern.experiments.tables import story_table
from fisherkern.files import atomic_path, read_json

HERE = Path(__file__).parent
BLOCK = re.compile(r"(<!-- table: (\S+)/(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(match: re.Match[str]) -> str:
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
