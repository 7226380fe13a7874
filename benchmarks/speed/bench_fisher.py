"""Time, error and memory of Fisher estimates, ours and others', on one model: the paper's Fig. 2.

    python -m benchmarks.speed.bench_fisher --data ml-1m                          # trains one first
    python -m benchmarks.speed.bench_fisher --data ml-1m --model base.safetensors
    python -m benchmarks.speed.bench_fisher --data ml-1m --max-len 200 --sequences 64 --only topk

Every estimate runs in this process, in turn with batch-wise K = 10, the unit of the column
`ratio`: absolute times of a shared machine mean nothing. Times are per sequence. What takes
longer than `--limit` seconds for all `--sequences` runs on fewer, which the column `sequences`
says. `error` is against `exact` on the same sequences after the best common factor; `off` and
`off_tied`, for rivals, the relative distance from ours with the same value or expectation,
over everything and over the item table. Refuses to start unless ours equals brute force.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fisherkern as fk
from benchmarks.common import (
    append,
    check_columns,
    device,
    matmul_rate,
    percentiles,
    seconds,
    with_peak,
)
from benchmarks.experiments.fisher_cost import best_scaled_error, relative_error
from benchmarks.figures import draw_figure
from benchmarks.rivals import RIVALS, Rival
from benchmarks.rivals.autograd import naive
from benchmarks.speed.flops import count
from benchmarks.speed.trained import trained_model

BATCHWISE = "batchwise (paper)"
OURS: list[tuple[str, dict[str, Any]]] = [
    *[(BATCHWISE, {"k": k, "reduction": "batchwise"}) for k in (10, 30, 50)],
    *[("topk", {"sampler": "topk", "k": k}) for k in (10, 30, 50, 100)],
    *[("model", {"sampler": "model", "k": k}) for k in (10, 30, 50, 100)],
    *[("random", {"sampler": "random", "k": k}) for k in (10, 30, 50)],
    ("target", {"sampler": "target", "k": 1}),
    *[("sketch", {"sampler": "sketch", "probes": r}) for r in (4, 8, 16)],
    *[("exact, top directions", {"sampler": "exact", "probes": r}) for r in (8, 32)],
    ("exact", {"sampler": "exact"}),
]
RIVAL_SIZES = (10, 50)
# "cpu" counts this process's own time, for machines that others use as well.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# Rivals start with so few sequences, and double.
FEWEST = 4


@dataclasses.dataclass
class Timing:
    """Seconds per sequence of an estimate and, run in turn with it, of batch-wise K = 10."""

    result: Mapping[str, Tensor]
    sequences: int
    own: list[float]
    unit: list[float]
    gflop: float
    extra_mb: float


class Bench:
    """The model, its sequences, and what has been measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data = fk.load(options.data)
        folder = Path(options.out)
        self.model = trained_model(
            self.data,
            options.model,
            folder,
            max_len=options.max_len,
            dim=options.dim,
            epochs=options.epochs,
        ).to(device())
        loader = self.data.loader(
            split="train",
            batch_size=options.sequences,
            max_len=self.model.max_len,
            limit=options.sequences,
        )
        (whole,) = loader
        self.whole = {name: tensor.to(device()) for name, tensor in whole.items()}
        self.sequences = len(whole["history"])
        self.ceiling = matmul_rate(1024, clock=CLOCKS[options.clock])
        self.same_size: dict[int, float] = {}
        self._reference: dict[tuple[str, int | None, int], fk.DiagFisher] = {}

    def check(self) -> None:
        """Raise SystemExit unless ours is brute force on a few sequences, in float32."""
        few = self.whole["history"][:3]
        k = min(5, self.model.num_items)
        ours = fk.diag_fisher(self.model, [few], sampler="topk", k=k, progress=False)
        error = relative_error(ours, naive(self.model)(few, k))
        if not error < 1e-4:
            raise SystemExit(f"bench_fisher: ours differs from brute force by {error:.2g}; stopped")

    def ours(self, arguments: Mapping[str, Any], n: int | None = None) -> fk.DiagFisher:
        """Our estimate on the first `n` sequences, in batches of the size asked for."""
        size = self.options.batch
        part = {name: tensor[:n] for name, tensor in self.whole.items()}
        batches = [
            {name: tensor[first : first + size] for name, tensor in part.items()}
            for first in range(0, len(part["history"]), size)
        ]
        return fk.diag_fisher(self.model, batches, progress=False, **arguments)

    def reference(self, sampler: str, k: int | None, n: int) -> fk.DiagFisher:
        """Ours, made once."""
        key = (sampler, k, n)
        if key not in self._reference:
            size = {} if k is None else {"k": k}
            self._reference[key] = self.ours({"sampler": sampler, **size}, n)
        return self._reference[key]

    def unit(self) -> float:
        whole = self.seconds(lambda: self.ours({"k": 10, "reduction": "batchwise"}))
        return whole / self.sequences

    def seconds(self, function: Callable[[], Any]) -> float:
        return seconds(function, CLOCKS[self.options.clock])

    def time(self, run: Callable[[int], Mapping[str, Tensor]], fewest: int) -> Timing:
        """The estimate on as many sequences as the limit allows, and its repeats there.

        Repeats share the time left after the runs that found the number; there is always one.
        """
        limit, n = self.options.limit, min(fewest, self.sequences)
        started = time.perf_counter()
        if n < self.sequences:
            run(n)  # what a library does once does not count
        while True:
            last = time.perf_counter()
            ((result, flop), extra) = with_peak(lambda n=n: count(lambda: run(n)))
            last = time.perf_counter() - last
            if n == self.sequences or 2 * last * (1 + self.options.repeats) > limit:
                break
            n = min(2 * n, self.sequences)
        own, unit = [], []
        for _ in range(self.options.repeats):
            unit.append(self.unit())
            own.append(self.seconds(lambda: run(n)) / n)
            if time.perf_counter() - started + n * own[-1] > limit:
                break
        return Timing(result, n, own, unit, flop / n / 1e9, extra)

    def row(self, name: str, sampler: str, k: int, timing: Timing, **about: Any) -> None:
        """Append the row to the CSV and print its essence."""
        p = percentiles([1e3 * t for t in timing.own])
        # Pair by pair: a run and the unit just before it had the same neighbours.
        pairs = zip(timing.own, timing.unit, strict=True)
        ratio = statistics.median(own / unit for own, unit in pairs)
        if name == BATCHWISE:
            self.same_size[k] = ratio
        n, exact = timing.sequences, self.reference("exact", None, timing.sequences)
        full = {key: timing.result.get(key, torch.zeros_like(exact[key])) for key in exact}
        missing = [key for key in exact if key not in timing.result]
        rate = timing.gflop * 1e9 / (p["p50_ms"] / 1e3)
        row = {
            "provider": name,
            "version": about.get("version", ""),
            "data": self.data.name,
            "T": self.model.max_len,
            "D": self.model.dim,
            "V": self.data.num_items,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "sampler": sampler,
            "k": k,
            "batch": min(self.options.batch, n),
            "sequences": n,
            "repeats": len(timing.own),
            "clock": self.options.clock,
            **{f"{key}_per_sequence": value for key, value in p.items()},
            "ratio": ratio,
            "ratio_same_k": ratio / self.same_size[k] if k in self.same_size else "",
            "error": best_scaled_error(full, exact),
            "relative_error": relative_error(full, exact),
            "off": about.get("off", ""),
            "off_tied": about.get("off_tied", ""),
            "missing": len(missing),
            "gflop_per_sequence": timing.gflop,
            "share_of_matmul": rate / self.ceiling,
            "extra_mb": timing.extra_mb,
        }
        append("fisher", [row])
        few = f"  {n} sequences only" if n < self.sequences else ""
        lacking = f"  nothing for {len(missing)} of {len(exact)} tensors" if missing else ""
        off = (
            f"  off {row['off']:.2g}, tied table {row['off_tied']:.2g}" if row["off"] != "" else ""
        )
        print(
            f"{name:<22} k={k:<4} {p['p50_ms']:8.2f} ms a sequence  ratio {ratio:6.2f}"
            f"  error {row['error']:.4f}{off}{lacking}{few}",
            flush=True,
        )

    def one_of_ours(self, name: str, arguments: dict[str, Any]) -> None:
        arguments = _within(arguments, self.model.num_items)
        timing = self.time(lambda n: self.ours(arguments, n), self.sequences)
        meta = timing.result.meta  # type: ignore[attr-defined]
        size = arguments.get("k") or arguments.get("probes") or meta["probes"]
        self.row(name, meta["sampler"], size, timing)

    def one_rival(self, rival: Rival, size: int) -> None:
        k = min(size, self.model.num_items)
        run = rival.prepare(self.model)
        timing = self.time(lambda n: run(self.whole["history"][:n], k), FEWEST)
        same = self.reference(
            rival.sampler, k if rival.sampler == "topk" else None, timing.sequences
        )
        full = {key: timing.result.get(key, torch.zeros_like(same[key])) for key in same}
        table = "item_embedding.weight"
        self.row(
            rival.name,
            rival.sampler,
            k,
            timing,
            version=rival.version(),
            off=relative_error(full, same),
            off_tied=relative_error({table: full[table]}, {table: same[table]}),
        )


def _within(arguments: dict[str, Any], num_items: int) -> dict[str, Any]:
    """The arguments with no more items than there are."""
    return {**arguments, "k": min(arguments["k"], num_items)} if "k" in arguments else arguments


def run_rivals(bench: Bench, only: str | None) -> None:
    """Every rival that can be had; one line says why another cannot."""
    for rival in RIVALS:
        if only and only not in rival.name:
            continue
        reason = rival.missing()
        for size in () if reason else RIVAL_SIZES:
            try:
                # Hooks on embeddings, layers without support: their rows say what came of it.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    bench.one_rival(rival, size)
            except Exception as error:  # a library of others may raise anything
                reason = (
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
                break
        if reason:
            print(f"{rival.name:<22} skipped: {reason}", flush=True)


COLUMNS = """provider version data T D V dtype sampler k batch sequences repeats clock
    p20_ms_per_sequence p50_ms_per_sequence p80_ms_per_sequence ratio ratio_same_k error
    relative_error off off_tied missing gflop_per_sequence share_of_matmul extra_mb""".split()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="ml-1m")
    parser.add_argument("--model", type=Path, help="a BERT4Rec's .safetensors; T and D are its own")
    parser.add_argument("--max-len", type=int, default=50, help="T of the model trained here")
    parser.add_argument("--dim", type=int, default=64, help="D of the model trained here")
    parser.add_argument("--epochs", type=int, default=16, help="of the model trained here")
    parser.add_argument("--out", default="runs/bench_fisher", help="keeps the model trained here")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256, help="sequences at once, of ours")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=20, help="seconds for one estimate and size")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="estimates whose name holds this")
    options = parser.parse_args(argv)
    for name in ("sequences", "batch", "repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: must be at least 1")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    try:
        check_columns("fisher", COLUMNS)
        bench = Bench(options)
    except fk.InputError as error:
        raise SystemExit(f"bench_fisher: {error}") from None
    bench.check()
    bench.unit()  # warm
    for name, arguments in OURS:
        if not options.only or options.only in name or name == BATCHWISE:
            bench.one_of_ours(name, arguments)
    run_rivals(bench, options.only)
    print(draw_figure(bench.data.name, bench.model.max_len, bench.sequences))


if __name__ == "__main__":
    main()
