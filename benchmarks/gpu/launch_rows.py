"""Put a sweep's winners into the launch table: python -m benchmarks.gpu.launch_rows FOLDER

FOLDER/sweep.jsonl has a line for each kernel, kind of dtype, launch setting and shape. A row of
fisherkern/ops/launch_table.py becomes the setting that was right and without stack at every shape
of the sweep and within 3 % of the shortest time (medians, their geometric mean over the shapes),
of these the one with fewest registers. Rows without such a setting, and all rows where there is no
sweep, stay as they are. Where another setting would gain more than 3 % at one width, that is
printed: a row serves all widths. Run prove.py afterwards. Needs no GPU.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.prove import Run, read_run
from fisherkern.errors import InputError
from fisherkern.files import atomic_path
from fisherkern.ops import launch_table, proven
from fisherkern.ops.launch_table import Launch

TABLE = Path(launch_table.__file__)
BLOCK = re.compile(r"(^_TABLE: [^\n]*= \{\n)(.*?)(^\}\n)", re.DOTALL | re.MULTILINE)
NEAR = 1.03
Key = tuple[str, int, str]
Line = dict[str, Any]


def shape_of(line: Line) -> tuple[int, int, int]:
    return line["D"], line["N"], line["V"]


def setting_of(line: Line) -> Launch:
    return Launch(*(line[field] for field in Launch._fields))


def fits(line: Line) -> bool:
    return bool(line["correct"]) and line.get("stack") == 0 and line.get("p50_ms", 0) > 0


def costs(lines: Sequence[Line]) -> dict[Launch, float]:
    """Time over the best one's, its geometric mean over the shapes, of settings that fit at all."""
    shapes = {shape_of(line) for line in lines}
    times: dict[Launch, dict[tuple[int, int, int], float]] = {}
    for line in lines:
        times.setdefault(setting_of(line), {})[shape_of(line)] = line.get("p50_ms", 0.0)
    wrong = {setting_of(line) for line in lines if not fits(line)}
    fit = {s: own for s, own in times.items() if s not in wrong and own.keys() == shapes}
    best = {shape: min(own[shape] for own in fit.values()) for shape in shapes if fit}
    return {
        setting: math.prod(own[shape] / best[shape] for shape in shapes) ** (1 / len(shapes))
        for setting, own in fit.items()
    }


def winner(lines: Sequence[Line]) -> Launch | None:
    """The setting to take; None where none fits at every shape."""
    found = costs(lines)
    near = [setting for setting in found if found[setting] <= NEAR * min(found.values())]
    registers = {
        setting: max(line["registers"] for line in lines if setting_of(line) == setting)
        for setting in near
    }
    return min(near, key=lambda s: (registers[s], found[s], s)) if near else None


def gains(lines: Sequence[Line], chosen: Launch) -> Iterator[str]:
    """What a row of one width alone would gain."""
    for width in sorted({line["D"] for line in lines}):
        found = costs([line for line in lines if line["D"] == width])
        best = min(found, key=lambda setting: found[setting])
        if found[chosen] > NEAR * found[best]:
            gain = found[chosen] / found[best]
            yield f"at D = {width} {tuple(best)} would be {gain:.2f} times as fast"


def changed_since(kernel: str, run: Run) -> bool:
    """Whether the kernel's source is another than the sweep's."""
    return any(
        hashes.get(f"{op}/triton") != proven.kernel_hash(op, "triton")
        for op, (_, kernels) in proven.TRITON.items()
        for hashes in run.hashes
        if kernel in kernels
    )


def winners(run: Run) -> dict[Key, Launch]:
    """The rows that the sweep decides; the rest is printed with the reason."""
    groups: dict[Key, list[Line]] = {}
    for line in run.sweep:
        groups.setdefault((line["kernel"], line["arch"], line["kind"]), []).append(line)
    found = {}
    for key, lines in groups.items():
        name = f"{key[0]} sm_{key[1]} {key[2]}"
        chosen = winner(lines)
        if changed_since(key[0], run):
            print(f"stays    {name}: its source has changed since the sweep")
        elif chosen is None:
            print(f"stays    {name}: no setting was right and without stack at every shape")
        else:
            found[key] = chosen
            print(f"decided  {name}: {tuple(chosen)}")
            print("".join(f"         {line}\n" for line in gains(lines, chosen)), end="")
    return found


def with_rows(text: str, rows: Mapping[Key, Launch]) -> str:
    """launch_table.py with other numbers in these rows; a row that is new comes last."""
    block = BLOCK.search(text)
    if block is None:
        raise InputError("launch_table.py: no _TABLE between its braces")
    lines = block[2].splitlines(keepends=True)
    for (kernel, arch, kind), row in rows.items():
        head = f'    ("{kernel}", {arch}, "{kind}"): Launch('
        new = f"{head}{', '.join(map(str, row))}),\n"
        places = [i for i, line in enumerate(lines) if line.startswith(head)]
        if places:
            lines[places[0]] = new
        else:
            lines.append(new)
    return text[: block.start(2)] + "".join(lines) + text[block.end(2) :]


def main(arguments: list[str] | None = None, table: Path = TABLE) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the results of a run")
    options = parser.parse_args(arguments)
    text = with_rows(table.read_text(encoding="utf-8"), winners(read_run(options.folder)))
    with atomic_path(table) as path:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"launch_rows: {error}")
