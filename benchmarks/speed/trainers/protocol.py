"""A trainer in a process of its own, which takes one step whenever bench_training.py asks.

Standard library and PyTorch alone: the Pythons of other libraries run it as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# Batches that targets are counted in: a library may draw many in one batch and few in the next.
COUNTED = 48


@dataclasses.dataclass
class Trainer:
    """One library's training of one model.

    version: the library's. steps: in one pass over its samples. batches: makes a fresh iterator
    over a pass's batches. step: one step of the optimiser on a batch, and its loss. targets: how
    many places of a batch enter the loss.
    """

    version: str
    steps: int
    batches: Callable[[], Iterator[Any]]
    step: Callable[[Any], float]
    targets: Callable[[Any], int]


def peak_megabytes() -> float:
    """The process's peak resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def serve(prepare: Callable[[dict[str, Any]], Trainer]) -> None:
    """Prepare the trainer that argument 1 (JSON) describes; answer lines of stdin until its end.

    Says what it is once; then "step" takes one, the making of its batch included, and says how
    many seconds that took.
    """
    options = json.loads(sys.argv[1])
    # Libraries print; the answers keep stdout for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    clock = CLOCKS[options["clock"]]
    trainer = prepare(options)
    prepared = peak_megabytes()
    counts = [trainer.targets(b) for b in itertools.islice(trainer.batches(), COUNTED)]
    with FlopCounterMode(display=False) as counter:
        trainer.step(next(trainer.batches()))
    answer(
        version=trainer.version,
        torch=torch.__version__,
        python=platform.python_version(),
        steps_per_pass=trainer.steps,
        targets_per_step=sum(counts) / len(counts),
        gflop=counter.get_total_flops() / 1e9,
        prepared_mb=prepared,
    )
    batches: Iterator[Any] = iter(())
    for _ in sys.stdin:
        started = clock()
        batch = next(batches, None)
        if batch is None:
            batches = trainer.batches()
            batch = next(batches)
        loss = trainer.step(batch)
        answer(seconds=clock() - started, loss=loss, peak_mb=peak_megabytes())
