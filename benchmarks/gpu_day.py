"""Everything that is worth doing in a few minutes on a GPU; nothing in it stops at a failure.

    python benchmarks/gpu_day.py --prepare                      # beforehand, without a GPU
    python benchmarks/gpu_day.py --part correct --out day       # 240 s: checks, sanitizers, times
    python benchmarks/gpu_day.py --part tune --out day          # 330 s: sweeps, profiles, engine
    python benchmarks/gpu_day.py --dry --out day                # every unit, small, without a GPU

Work is cut into units, each a process with a limit of its own that appends JSON lines to the
files under --out as it goes: an illegal access, a hang or the end of the time costs one unit. At
the end, and on SIGTERM, there is one archive beside them, `day.tar.gz`, and a table on stdout.
The GPU's machine needs Python with torch and triton, and for the extension nvcc and pybind11;
no network. `--prepare` fills an ignored folder, build/gpu_carry, that has to travel along: the
data, a trained model, the launch settings to try. A dry run has planted faults and ends with
status 0 where exactly these are found; the others with 0 where every unit was right.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu.day import Day

BUDGETS = {"correct": 240.0, "tune": 330.0, "dry": 900.0}
# Kept back from the budget for the archive and the table.
LAST_ACT = 12.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("correct", "tune", "dry"))
    parser.add_argument("--dry", action="store_true", help="without a GPU, faults planted")
    parser.add_argument("--prepare", action="store_true", help="make what travels along")
    parser.add_argument("--out", type=Path, help="folder of the lines and the archive")
    parser.add_argument("--budget", type=float, help="seconds in all")
    parser.add_argument("--workers", type=int, help="units at once: 16, or 2 in a dry run")
    parser.add_argument("--only", nargs="+", help="units whose name begins with one of these")
    parser.add_argument("--again", type=Path, help="--out of a part whose failed units run again")
    parser.add_argument("--model", type=Path, help="a BERT4Rec to take along, not trained here")
    parser.add_argument("--seconds", type=float, default=600, help="of --prepare, for each step")
    parser.add_argument("--unit", help="run this one in this process")
    parser.add_argument("--work", type=Path, help="folder of logs and caches")
    parser.add_argument("--carried", type=Path, help="folder that --prepare fills")
    options = parser.parse_args(argv)
    if options.dry and options.part is None:
        options.part = "dry"
    if not options.prepare and (options.part is None or options.out is None):
        parser.error("--part and --out, or --dry and --out, or --prepare")
    return options


def settle(options: argparse.Namespace) -> None:
    """Environment and paths, before triton is imported: it reads some of them only then."""
    root = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(root))
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    os.environ.pop("FISHERKERN_BACKEND", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Without it a question for a GPU would touch CUDA, which no fork survives.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    settle(options)
    from benchmarks.gpu.day import CARRIED, WORK, Day

    carried = options.carried or CARRIED
    if options.prepare:
        from benchmarks.gpu.prepare import prepare

        prepare(carried, options.model, options.seconds)
        return 0
    work = options.work or WORK / options.part
    day = Day(options.part, options.out.resolve(), work.resolve(), carried.resolve(), options.dry)
    os.environ.setdefault("TRITON_CACHE_DIR", str(day.work.parent / "triton"))
    commit = day.carried / "commit.txt"
    if commit.exists():
        os.environ.setdefault("FISHERKERN_COMMIT", commit.read_text().strip())
    if options.unit:
        from benchmarks.gpu import units

        units.run(day, options.unit)
        return 0
    return run(day, options)


def run(day: Day, options: argparse.Namespace) -> int:
    """All units of the part; the exit status."""
    from benchmarks.gpu import units
    from benchmarks.gpu.schedule import Schedule, forks_work, on_signals, unit_states

    shutil.rmtree(day.work, ignore_errors=True)
    day.work.mkdir(parents=True)
    day.out.mkdir(parents=True, exist_ok=True)
    for old in (*day.out.glob("*.jsonl"), day.out / "day.tar.gz"):
        old.unlink(missing_ok=True)
    again = options.again or kept_lines(day)
    own = {"correct": units.correct, "tune": lambda: units.tune(again), "dry": units.dry}
    waiting = list(own[day.part]())
    if options.only:
        waiting = [unit for unit in waiting if unit.name.startswith(tuple(options.only))]
    warm_up()
    workers = options.workers or (2 if day.dry else 16)
    budget = (options.budget or BUDGETS[day.part]) - LAST_ACT
    schedule = Schedule(day, waiting, workers, budget, fork=forks_work(day))
    on_signals(schedule.stop)
    schedule.run()
    finish(day)
    states = unit_states(day)
    wrong = {name for name, (ok, _) in states.items() if not ok}
    planted = {unit.name for unit in waiting if unit.name.startswith("planted:")}
    return int(wrong != planted)


def warm_up() -> None:
    """Import once what every unit would: forks have it. CUDA must not have been touched."""
    import torch

    from benchmarks.gpu import checks, fisher_checks, segment_checks, sweep, timings  # noqa: F401

    with contextlib.suppress(ImportError):  # then the units say that triton is missing
        for name in sweep.SUBJECTS:
            sweep.kernel_of(name)

    import fisherkern  # noqa: F401

    assert not torch.cuda.is_initialized()


def finish(day: Day) -> None:
    """The archive and the table; whatever is wrong with one of them, the other is there."""
    from benchmarks.gpu import report

    try:
        text = report.table(day)
    except Exception:
        text = traceback.format_exc()
    try:
        path, left = report.archive(day, text)
        text += f"\n{path}: {path.stat().st_size} bytes, {len(left)} files left out"
        if day.part == "correct":
            kept = kept_lines(day)
            kept.mkdir(exist_ok=True)
            for name in ("check.jsonl", "units.jsonl"):
                if (day.out / name).exists():
                    shutil.copy(day.out / name, kept)
    except Exception:
        text += "\n" + traceback.format_exc()
    print(text, flush=True)


def kept_lines(day: Day) -> Path:
    """Where a machine that is not given back finds what was wrong in the part before."""
    return day.work.parent / "lines"


if __name__ == "__main__":
    sys.exit(main())
