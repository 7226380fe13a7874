"""Several processes beside one, a thread each: processes.csv.

    python -m benchmarks.speed.bench_processes

One process and a group of gloo processes take turns, so that what else the machine does falls on
both; while one works the other waits for its turn. A turn is a whole call, from the word that
starts it to the last process's answer: what is dealt, joined and waited for is all in it. With
`--clock cpu` it is the processor time of the process that takes most: what the wall clock would
show with a core for each. `faster` is the median over turns of one process's time by the group's,
`efficiency` that by the number of processes, `joined_mb` what a process sends. `merge` is
`merge_files` of three members of `--items` items, a sequence of it an item. Refuses to start unless
the group's ranks and merged files are those of one process and its Fisher within 1e-6 of a tensor's
largest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fisherkern as fk
from benchmarks.common import (
    append,
    check_columns,
    child_environment,
    peak_megabytes,
    percentiles,
)

WORK = ("fisher", "evaluate", "merge")
TOLERANCE = 1e-6
# Those of a merge.
MEMBERS, MEMBER = 3, {"max_len": 50, "dim": 128, "layers": 1}
COLUMNS = """processes work model data T D V layers batch sampler sequences dtype clock turns
    p20_ms p50_ms p80_ms sequences_per_s faster efficiency joined_mb peak_mb""".split()


class Group:
    """Processes that have joined and wait for words."""

    def __init__(self, world: int, folder: Path, options: dict[str, Any]) -> None:
        self.world, self.folder, self.clock = world, folder, options["clock"]
        self.times: dict[str, list[float]] = {work: [] for work in WORK}
        self.peak_mb = 0.0
        command = [sys.executable, "-m", "benchmarks.speed.bench_processes", "--worker"]
        self.workers = [
            subprocess.Popen(
                [*command, json.dumps({**options, "rank": rank, "world": world})],
                env=child_environment() | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]

    def turn(self, work: str) -> list[dict[str, Any]]:
        """Every process's answer to a word."""
        started = time.perf_counter()
        for worker in self.workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{work}\n")
            worker.stdin.flush()
        answers = []
        for worker in self.workers:
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line:
                raise SystemExit("bench_processes: a process gave up, see above")
            answers.append(json.loads(line))
        self.peak_mb = max(answer["peak_mb"] for answer in answers)
        wall, cpu = time.perf_counter() - started, max(answer["cpu_s"] for answer in answers)
        self.times[work].append(wall if self.clock == "wall" else cpu)
        return answers

    def close(self) -> None:
        for worker in self.workers:
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
        for worker in self.workers:
            worker.wait()


def work_in_turn(about: dict[str, Any]) -> None:
    """One process of a group: a call for each word, an answer for each call."""
    rank, world = about["rank"], about["world"]
    folder = Path(about["folder"])
    torch.set_num_threads(1)
    if world > 1:
        store = f"file://{folder}/store-{world}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    data = fk.load(about["data"])
    torch.manual_seed(0)
    kind = {"BERT4Rec": fk.BERT4Rec, "SASRec": fk.SASRec}[about["model"]]
    shape = {"max_len": about["max_len"], "dim": about["dim"], "layers": about["layers"]}
    model = kind(data.num_items, **shape).eval()
    for line in sys.stdin:
        word, started = line.strip(), time.process_time()
        if word == "fisher":
            how = {"batch_size": about["batch"], "max_len": about["max_len"]}
            loader = data.loader(split="train", limit=about["sequences"], **how)
            found = fk.diag_fisher(model, loader, sampler=about["sampler"], progress=False)
            found.save(folder / f"{world}-{rank}.safetensors")
            answer: dict[str, Any] = {"sequences": found.meta["num_sequences"]}
        elif word == "merge":
            members = [folder / f"member{number}.safetensors" for number in range(MEMBERS)]
            merged = fk.merge_files(members, folder / f"merged-{world}.safetensors")
            answer = {"sequences": merged["catalogue"]["items"]}
        else:
            report = fk.evaluate(model, data, batch_size=about["batch"])
            answer = {"sequences": report.num_users, "ranks": report.ranks.tolist()}
        answer |= {"peak_mb": peak_megabytes(), "cpu_s": time.process_time() - started}
        print(json.dumps(answer), flush=True)


def check(one: Group, several: Group) -> None:
    """Raise SystemExit unless all found what one process does; warms them."""
    expected, *found = (group.turn("evaluate") for group in (one, several))
    if any(own["ranks"] != expected[0]["ranks"] for own in found[0]):
        raise SystemExit("bench_processes: the ranks are not those of one process; stopped")
    for group in (one, several):
        group.turn("fisher")
    fisher = fk.DiagFisher.load(one.folder / "1-0.safetensors")
    for rank in range(several.world):
        own = fk.DiagFisher.load(several.folder / f"{several.world}-{rank}.safetensors")
        for name, value in fisher.items():
            error = float((own[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
            if not error <= TOLERANCE:
                raise SystemExit(f"bench_processes: {name} is off by {error:.2g}; stopped")
    for group in (one, several):
        group.turn("merge")
    files = [one.folder / f"merged-{group.world}.safetensors" for group in (one, several)]
    if files[0].read_bytes() != files[1].read_bytes():
        raise SystemExit("bench_processes: the merged file is not that of one process; stopped")
    for group in (one, several):
        group.times = {work: [] for work in WORK}


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for one process and for the group, for each kind of work."""
    names = ("data", "model", "max_len", "dim", "layers", "batch", "sampler", "sequences", "clock")
    about = {name: getattr(options, name) for name in names}
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        contextlib.ExitStack() as stack,
    ):
        groups = []
        for number in range(MEMBERS):
            torch.manual_seed(number)
            member = fk.SASRec(options.items, **MEMBER)
            fk.save_model(member, Path(folder) / f"member{number}.safetensors")
        for world in (1, options.processes):
            groups.append(Group(world, Path(folder), {**about, "folder": folder}))
            stack.callback(groups[-1].close)
        check(*groups)
        sequences = {}
        for work in options.work:
            for _ in range(options.turns):
                for group in groups:
                    sequences[work] = group.turn(work)[0]["sequences"]
        size = sum(
            own.numel() for own in fk.DiagFisher.load(Path(folder) / "1-0.safetensors").values()
        )
        return [
            _row(group, groups[0], work, about, sequences[work], size)
            for work in options.work
            for group in groups
        ]


def _row(
    group: Group, one: Group, work: str, about: dict[str, Any], sequences: int, size: int
) -> dict[str, Any]:
    times = group.times[work]
    p = percentiles([1e3 * seconds for seconds in times])
    # Turn by turn: those side by side had the same neighbours.
    pairs = zip(one.times[work], times, strict=True)
    faster = statistics.median(alone / own for alone, own in pairs)
    others = (group.world - 1) / group.world
    # Sums are exchanged and given to all, in float64; ranks are int64.
    joined = 8 * 2 * others * {"fisher": size, "evaluate": sequences, "merge": 0}[work]
    shape = {
        "model": about["model"],
        "data": about["data"],
        "T": about["max_len"],
        "D": about["dim"],
        "V": fk.load(about["data"]).num_items,
        "layers": about["layers"],
        "batch": about["batch"],
    }
    if work == "merge":
        shape = {"model": "SASRec", "data": f"{MEMBERS} members", "T": MEMBER["max_len"]}
        shape |= {"D": MEMBER["dim"], "V": sequences, "layers": MEMBER["layers"], "batch": ""}
    return {
        "processes": group.world,
        "work": work,
        **shape,
        "sampler": about["sampler"] if work == "fisher" else "",
        "sequences": sequences,
        "dtype": "float32",
        "clock": about["clock"],
        "turns": len(times),
        **p,
        "sequences_per_s": 1e3 * sequences / p["p50_ms"],
        "faster": faster,
        "efficiency": faster / group.world,
        "joined_mb": joined / 2**20,
        "peak_mb": group.peak_mb,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="in the group, 2 or more")
    parser.add_argument("--data", default="ml-1m")
    parser.add_argument("--model", choices=("BERT4Rec", "SASRec"), default="BERT4Rec")
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sampler", default="topk", help="of the Fisher")
    parser.add_argument("--sequences", type=int, default=1024, help="of the Fisher")
    parser.add_argument("--items", type=int, default=400_000, help="of the merge's members")
    parser.add_argument("--folder", type=Path, help="for files (default: the system's)")
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for name in ("processes", "max_len", "dim", "layers", "batch", "sequences", "items", "turns"):
        least = 2 if name == "processes" else 1
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: must be at least {least}")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.worker is not None:
        work_in_turn(json.loads(options.worker))
        return
    torch.set_num_threads(1)
    try:
        check_columns("processes", COLUMNS)
        fk.load(options.data)
    except fk.InputError as error:
        raise SystemExit(f"bench_processes: {error}") from None
    rows = compare(options)
    append("processes", rows)
    for row in rows:
        print(
            f"{row['work']:<9} {row['processes']} processes  {row['p50_ms']:9.0f} ms"
            f"  {row['sequences_per_s']:8.0f} sequences/s  {row['faster']:5.2f} times one's speed"
            f"  {row['joined_mb']:6.1f} MB sent  peak {row['peak_mb']:6.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
