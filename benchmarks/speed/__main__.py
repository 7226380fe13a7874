"""Compare the working tree's speed with a revision's: python -m benchmarks.speed --base REV

Two processes, one of each revision's package, run the same small cases in turn, so that what
else the machine does falls on both. The figure is CPU time: the median over the rounds of
now / before. A case above --limit is measured again with three times the rounds; if it stays
above, the exit status is 1. Nothing is written into the checkout. --instructions counts those
of one call with valgrind, for machines whose seconds are too noisy; it takes minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import child_environment
from benchmarks.speed.instructions import under_callgrind
from benchmarks.speed.small_cases import CASES
from fisherkern.errors import InputError, shown

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1.5
ROUNDS = 5
# CPU seconds of one process's turn, at least.
TURN = 0.05


def git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)


def package_of(revision: str, folder: Path) -> Path:
    """A folder with `fisherkern` as it was at `revision`, its extension built, and nothing else."""
    archive = git("archive", revision)
    if archive.returncode != 0:
        raise InputError(f"--base: {shown(revision)} is no revision of {ROOT}")
    tree, package = folder / "tree", folder / "package"
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(tree, filter="data")
    if git("diff", "--quiet", revision, "--", "csrc", "setup.py").returncode == 0:
        for built in (ROOT / "fisherkern").glob("_C.*.so"):
            shutil.copy(built, tree / "fisherkern")
    else:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = {**child_environment(), "FISHERKERN_CUDA": "0"}
        subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
    package.mkdir()
    (tree / "fisherkern").rename(package / "fisherkern")
    return package


class Worker:
    """A process with the package of one revision; the cases are always those of this file."""

    def __init__(self, package: Path, counts: Path | None = None) -> None:
        environment = child_environment()
        before, counter = under_callgrind(counts) if counts else ([], [])
        environment["PYTHONPATH"] = f"{package}:{environment['PYTHONPATH']}"
        command = [*before, sys.executable, "-m", "benchmarks.speed.case_worker"]
        command += [str(package), *counter]
        self.process = subprocess.Popen(
            command,
            cwd=package,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def cost(self, name: str, calls: int) -> float | str:
        """CPU seconds or instructions a call, or why the case does not run."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, calls]) + "\n")
        self.process.stdin.flush()
        answer: float | str = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        self.process.communicate()


def measure(base: Worker, head: Worker, name: str, rounds: int) -> dict[str, Any]:
    """The cost of both and the ratio's p20, median and p80; or the reason why not."""
    once = [worker.cost(name, 1) for worker in (base, head)]
    for revision, answer in zip(("base", "now"), once, strict=True):
        if isinstance(answer, str):
            return {"case": name, revision: answer}
    calls = max(1, round(TURN / max(float(answer) for answer in once)))
    pairs = []
    for number in range(rounds):
        order = (base, head) if number % 2 == 0 else (head, base)
        times = {worker: float(worker.cost(name, calls)) for worker in order}
        pairs.append((times[base], times[head]))
    ratios = sorted(after / before for before, after in pairs)
    return {
        "case": name,
        "base": statistics.median(before for before, _ in pairs),
        "now": statistics.median(after for _, after in pairs),
        "ratio": statistics.median(ratios),
        "p20": ratios[round(0.2 * (rounds - 1))],
        "p80": ratios[round(0.8 * (rounds - 1))],
    }


def compare(
    before: Path, after: Path, names: Sequence[str], limit: float, counts: Path | None = None
) -> list[dict[str, Any]]:
    """A row of `measure` for each case, in turns of the packages in two folders.

    With a folder for the `counts` of instructions, these are the cost.
    """
    base, head = Worker(before, counts), Worker(after, counts)
    rounds = 3 if counts else ROUNDS
    try:
        rows = []
        for name in names:
            row = measure(base, head, name, rounds)
            if row.get("ratio", 0.0) > limit:
                row = measure(base, head, name, 3 * rounds)
            rows.append(row)
            print(line(row, limit, ("M ", 1e-6) if counts else ("ms", 1e3)), flush=True)
        return rows
    finally:
        base.close()
        head.close()


def line(row: Mapping[str, Any], limit: float, unit: tuple[str, float] = ("ms", 1e3)) -> str:
    if "ratio" not in row:
        missing = "base" if "base" in row else "now"
        return f"{row['case']:24} not run by {missing}: {row[missing]}"
    name, scale = unit
    base, now = scale * row["base"], scale * row["now"]
    figures = f"{base:9.2f} {name} {now:9.2f} {name} {row['ratio']:7.2f}"
    spread = f"({row['p20']:.2f} to {row['p80']:.2f})"
    return f"{row['case']:24}{figures}  {spread}{'  SLOWER' if row['ratio'] > limit else ''}"


def failed(rows: Sequence[Mapping[str, Any]], limit: float) -> list[str]:
    """Cases that became slower, and those that the working tree alone cannot run."""
    gone = {"case", "now"}
    return [row["case"] for row in rows if row.get("ratio", 0.0) > limit or set(row) == gone]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--base", required=True, help="the revision to compare with")
    parser.add_argument("--limit", type=float, default=LIMIT, help="a ratio above it fails")
    parser.add_argument("--only", default="", help="cases whose names hold this text")
    parser.add_argument(
        "--instructions", action="store_true", help="count instructions, by valgrind"
    )
    options = parser.parse_args(arguments)
    names = [name for name in CASES if options.only in name]
    try:
        with tempfile.TemporaryDirectory() as folder:
            before = package_of(options.base, Path(folder))
            print(f"{'case':24}{'base':>12}{'now':>13}{'ratio':>8}  (p20 to p80)")
            counts = Path(folder) if options.instructions else None
            slower = failed(compare(before, ROOT, names, options.limit, counts), options.limit)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(slower)} of {len(names)} cases fail" + "".join(f"; {name}" for name in slower))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
