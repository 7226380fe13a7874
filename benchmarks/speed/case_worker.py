"""A process that times small cases of the package on its path: `python -m ... PACKAGE [COUNTER]`.

Each line on standard input is a case's name and a number of calls; the answer is a line of
JSON: CPU seconds (under callgrind, instructions) a call, or why this revision cannot run the case.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fisherkern as fk
from benchmarks.speed.instructions import InstructionCounter
from benchmarks.speed.small_cases import CASES


def cpu_seconds(call: Callable[[], Any], count: int) -> float:
    """Of a number of calls."""
    started = time.process_time()
    for _ in range(count):
        call()
    return time.process_time() - started


def main(package: str, *counter: str) -> None:
    found = Path(fk.__file__).resolve().parents[1]
    assert found == Path(package).resolve(), f"{found} was imported, not {package}"
    logging.disable()
    cost: Callable[[Callable[[], Any], int], float] = cpu_seconds
    if counter:
        cost = InstructionCounter(*counter).of
    calls: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        name, count = json.loads(line)
        try:
            if name not in calls:
                calls[name] = CASES[name]()
                calls[name]()  # the first call prepares what later ones find
            answer: float | str = cost(calls[name], count) / count
        except (AttributeError, TypeError, RuntimeError, ValueError) as error:
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
