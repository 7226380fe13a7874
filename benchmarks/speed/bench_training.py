"""Training throughput, ours beside RecBole's and RecTools': training.csv.

    python -m benchmarks.speed.bench_training \\
        --recbole-python A/bin/python --rectools-python B/bin/python

Each library trains in a process of its own, with the Python given for it, as their pins differ;
`benchmarks/speed/trainers/train_*.py` say what to install. One left out is skipped and said so. The
processes take turns, a step each, so that what else the machine does falls on all of them.

An epoch means another thing in each: RecBole has a sample for every prefix of a user's items,
the others one a user. The unit here is a training target, a place that enters the loss: a masked
item, or a position whose next item is predicted. `seconds_per_pass` is steps of a pass times
the median step, extrapolated. `peak_mb` is the process's peak resident memory, data included.
Refuses to start unless a step's loss of ours is the definition's in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fisherkern as fk
from benchmarks.common import append, check_columns, child_environment, matmul_rate, percentiles
from benchmarks.speed.trainers.protocol import CLOCKS
from benchmarks.speed.trainers.train_fisherkern import model_and_objective, training_run
from fisherkern.files import atomic_path

OURS = "fisherkern"
MODELS = ("BERT4Rec", "SASRec")
COLUMNS = """provider version provider_torch model data T D V layers batch dtype clock steps
    p20_ms p50_ms p80_ms targets_per_step targets_per_s ours_faster steps_per_pass
    seconds_per_pass gflop_per_step gflop_s share_of_matmul peak_mb prepared_mb""".split()


def check(model_name: str) -> None:
    """Raise SystemExit unless the loss of one of our steps is its definition in float64.

    The definition is taken row by row, without padding; for SASRec with nothing after the
    prefix in question.
    """
    items, width = 37, 9
    generator = torch.Generator().manual_seed(1)
    rows = [
        torch.randint(1, items + 1, (n,), generator=generator).tolist() for n in (9, 2, 5, 9, 3)
    ]
    data = fk.SequenceDataset(
        "check",
        [item for row in rows for item in [*row, 1, 1]],
        [0, *torch.tensor([len(row) + 2 for row in rows]).cumsum(0).tolist()],
        [str(item) for item in range(items)],
        [str(user) for user in range(len(rows))],
    )
    model, objective = model_and_objective(model_name, items, width, 8, 2, dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    run = training_run(model, objective, data, len(rows))
    exact, _ = model_and_objective(model_name, items, width, 8, 2, dropout=0.0)
    exact.load_state_dict(model.state_dict())
    (tokens,) = run.windows(1)
    with run.drawing(0) as draws:
        found = _definition(exact.double().eval(), objective, tokens, draws)
    error = abs(run.step(tokens)[0] / found - 1)
    if not error < 1e-5:
        raise SystemExit(f"bench_training: {model_name}'s loss is off by {error:.2g}; stopped")


def _definition(model: Any, objective: Any, tokens: torch.Tensor, draws: torch.Generator) -> float:
    losses = []
    weight, bias = model.head()

    def score(row: torch.Tensor, place: int, item: int) -> None:
        logits = F.linear(model.transform(model.states(row[None])[0, place]), weight, bias)
        losses.append(-float(logits.log_softmax(0)[item - 1]))

    with torch.no_grad():
        if isinstance(objective, fk.MaskedItems):
            positions, chosen = objective.draw(tokens, draws)
            for row, places, which in zip(tokens, positions, chosen, strict=True):
                places = places[which]
                hidden = row.clone()
                hidden[places] = model.mask_token
                padding = int((row == 0).sum())
                for place in places.tolist():
                    score(hidden[padding:], place - padding, int(row[place]))
        else:
            for row in tokens:
                row = row[row != 0]
                for n in range(1, len(row)):
                    # The places after it are emptied, not cut off: positions count from the end.
                    score(F.pad(row[:n], (0, len(row) - 1 - n)), n - 1, int(row[n]))
    return statistics.fmean(losses)


class Worker:
    """A library's trainer in its process, ready to step."""

    def __init__(self, provider: str, python: str, options: dict[str, Any]) -> None:
        self.provider, self.python = provider, python
        module = f"benchmarks.speed.trainers.train_{provider.lower()}"
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-m", module, json.dumps(options)],
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.times: list[float] = []
        try:
            self.about = self.answer()
        except BaseException:
            self.close()
            raise

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench_training: {self.provider} ({self.python}) gave up, see above")
        return json.loads(line)

    def step(self, counts: bool) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        found = self.answer()
        self.about |= found
        if counts:
            self.times.append(found["seconds"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()

    @property
    def per_target(self) -> list[float]:
        return [t / self.about["targets_per_step"] for t in self.times]


def compare(
    model: str, data: fk.SequenceDataset, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each library, after `--steps` steps of each in turn."""
    pythons = {
        OURS: sys.executable,
        "RecBole": options.recbole_python,
        "RecTools": options.rectools_python,
    }
    about = {
        "data": data.name,
        "model": model,
        "folder": str(options.out),
        "max_len": options.max_len,
        **{name: getattr(options, name) for name in ("dim", "layers", "batch", "threads", "clock")},
    }
    workers: list[Worker] = []
    try:
        for provider, python in pythons.items():
            if python is None:
                print(f"{provider:<12} skipped: --{provider.lower()}-python is not given")
                continue
            # Ours loads what the caller named, the others the file written from it.
            source = {"data": options.data} if provider == OURS else {}
            workers.append(Worker(provider, python, {**about, **source}))
        for turn in range(options.steps + 1):
            for worker in workers:
                worker.step(counts=turn > 0)  # the first warms
    finally:
        for worker in workers:
            worker.close()
    ceiling = matmul_rate(1024, clock=CLOCKS[options.clock])
    return [_row(worker, workers[0], about, data.num_items, ceiling) for worker in workers]


def _row(
    worker: Worker, ours: Worker, about: dict[str, Any], num_items: int, ceiling: float
) -> dict[str, Any]:
    told, p = worker.about, percentiles([1e3 * t for t in worker.times])
    seconds = p["p50_ms"] / 1e3
    # Turn by turn: steps that were taken side by side had the same neighbours.
    pairs = zip(worker.per_target, ours.per_target, strict=True)
    return {
        "provider": worker.provider,
        "version": told["version"],
        "provider_torch": told["torch"],
        "model": about["model"],
        "data": about["data"],
        "T": about["max_len"],
        "D": about["dim"],
        "V": num_items,
        "layers": about["layers"],
        "batch": about["batch"],
        "dtype": "float32",
        "clock": about["clock"],
        "steps": len(worker.times),
        **p,
        "targets_per_step": told["targets_per_step"],
        "targets_per_s": told["targets_per_step"] / seconds,
        "ours_faster": statistics.median(theirs / own for theirs, own in pairs),
        "steps_per_pass": told["steps_per_pass"],
        "seconds_per_pass": seconds * told["steps_per_pass"],
        "gflop_per_step": told["gflop"],
        "gflop_s": told["gflop"] / seconds,
        "share_of_matmul": told["gflop"] * 1e9 / seconds / ceiling,
        "peak_mb": told["peak_mb"],
        "prepared_mb": told["prepared_mb"],
    }


def write_inter(data: fk.SequenceDataset, folder: Path) -> None:
    """The data as RecBole's atomic file, time being the place in the user's sequence."""
    path = folder / data.name / f"{data.name}.inter"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part, part.open("w") as stream:
        stream.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user in range(data.num_users):
            for time, item in enumerate(data.sequence(user).tolist()):
                stream.write(f"{user + 1}\t{item}\t{time}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="ml-1m")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="of each library, after one to warm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--recbole-python", help="the Python that has RecBole")
    parser.add_argument("--rectools-python", help="the Python that has RecTools")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_training"), help="scratch")
    options = parser.parse_args(argv)
    for name in ("max_len", "dim", "layers", "batch", "steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    options.out = options.out.resolve()
    torch.set_num_threads(options.threads)
    try:
        check_columns("training", COLUMNS)
        data = fk.load(options.data)
    except fk.InputError as error:
        raise SystemExit(f"bench_training: {error}") from None
    for model in options.models:
        check(model)
    write_inter(data, options.out)
    for model in options.models:
        rows = compare(model, data, options)
        append("training", rows)
        for row in rows:
            print(
                f"{row['provider']:<12} {model:<9} T={options.max_len:<4}"
                f" {row['p50_ms']:8.1f} ms a step  {row['targets_per_s']:8.0f} targets/s"
                f"  ours is {row['ours_faster']:5.2f} times as fast"
                f"  {row['seconds_per_pass']:8.1f} s a pass  peak {row['peak_mb']:6.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
