"""Commands that are killed and called again: `python -m tests.fuzz.kills --kills 200`.

A child is forked for each run, so that nothing is imported twice.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import fisherkern as fk
from fisherkern.cli import main as command_line
from fisherkern.data import write_seqrec

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT)
SIZES = "--encoder SASRec --dim 8 --layers 1 --max-len 8 --batch-size 16"
COMMANDS = {
    "train": f"train --data {{in}}/data.txt {SIZES} --epochs 5 --save-every-steps 2 --ema 0.9 "
    "--validate-every 1 --patience 9 --quiet --out {out}",
    "fisher": "fisher {in}/a.safetensors --data {in}/data.txt --k 3 --batch-size 4 --quiet "
    "--out {out}",
    "merge": "merge {in}/a.safetensors {in}/b.safetensors --out {out}",
    "merge from disk": "merge {in}/a.safetensors {in}/b.safetensors --stream --out {out}",
    "align": "align {in}/a.safetensors {in}/b.safetensors --out {out}",
}


def prepare(folder: Path) -> None:
    """Write what the commands read."""
    data = fk.synthetic(60, 40, clusters=8)
    write_seqrec(data, folder / "data.txt")
    data = fk.load(folder / "data.txt")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = fk.SASRec(data.num_items, max_len=8, dim=8, layers=1)
        model.item_ids = list(data.item_ids)
        fk.save_model(model, folder / f"{name}.safetensors")


def started(words: Sequence[str]) -> int:
    """Fork a child that runs a command; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    with contextlib.suppress(BaseException), Path("/dev/null").open("w") as nowhere:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            status = command_line(list(words))
    os._exit(status)


def ended(child: int) -> int:
    """Wait for a child; its status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def words_of(command: str, folder: Path) -> list[str]:
    return [
        w.format(**{"in": folder / "in", "out": folder / "out"}) for w in COMMANDS[command].split()
    ]


def whole_runs(folder: Path) -> Mapping[str, tuple[float, dict[str, bytes]]]:
    """Run each command once, undisturbed: its seconds and what it wrote.

    Once before in this process, for what is imported and compiled at its first use.
    """
    found = {}
    for command in COMMANDS:
        shutil.rmtree(folder / "out", ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            assert command_line(words_of(command, folder)) == 0, command
        shutil.rmtree(folder / "out")
        begin = time.perf_counter()
        status = ended(started(words_of(command, folder)))
        assert status == 0, (command, status)
        found[command] = time.perf_counter() - begin, contents(folder / "out")
    return found


def kill(
    command: str, folder: Path, whole: tuple[float, dict[str, bytes]], draw: random.Random
) -> str | None:
    """Kill a command at random moments, let it end, and compare; what was wrong."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    words, (seconds, expected) = words_of(command, folder), whole
    for _ in range(draw.choice((1, 1, 2, 3))):
        child = started(words)
        time.sleep(draw.uniform(0, seconds))
        sent = draw.choice(SIGNALS)
        os.kill(child, sent)
        status = ended(child)
        if status not in (0, 130, -sent):
            return f"{command}: status {status} after {sent.name}"
        left = contents(folder / "out") if (folder / "out").exists() else {}
        for name, content in left.items():
            if name in expected and not name.endswith(".json") and content != expected[name]:
                return f"{command}: {name} is half-written"
    status = ended(started(words))
    if status != 0:
        return f"{command}: status {status} after it was killed"
    found = contents(folder / "out")
    if found.keys() != expected.keys():
        return f"{command}: {sorted(found.keys() ^ expected.keys())} left or missing"
    differ = [name for name in expected if found[name] != expected[name]]
    return f"{command}: {differ} differ" if differ else None


def together(command: str, folder: Path, expected: dict[str, bytes], processes: int) -> str | None:
    """Start several processes on one folder: each is right or refused."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    children = [started(words_of(command, folder)) for _ in range(processes)]
    statuses = sorted(ended(child) for child in children)
    if not set(statuses) <= {0, 2} or 0 not in statuses:
        return f"{command}: {processes} processes ended with {statuses}"
    found = contents(folder / "out")
    if {name: found.get(name) for name in expected} != expected or found.keys() != expected.keys():
        return f"{command}: {processes} processes left something else"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faults = []
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        folder = Path(scratch)
        (folder / "in").mkdir()
        prepare(folder / "in")
        whole = whole_runs(folder)
        for number in range(options.kills):
            draw = random.Random(f"{options.seed} {number}")
            command = list(COMMANDS)[number % len(COMMANDS)]
            faults.append(kill(command, folder, whole[command], draw))
        for command, (_, expected) in whole.items():
            faults.append(together(command, folder, expected, 4))
    found = [fault for fault in faults if fault is not None]
    print(json.dumps({"kills": options.kills, "faults": found}, indent=1))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
