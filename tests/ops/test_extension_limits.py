"""The compiled extension where the system gives too little, or there is nothing to do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.extension import NO_EXTENSION

from fisherkern.ops import _extension, build

# Run by an interpreter of its own: the failure it looks for ends the process.
CRAMPED = """
import ctypes, importlib.util, pathlib, resource, sys

path, positions, megabytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
spec = importlib.util.spec_from_file_location("fisherkern._C", path)
extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
rows = columns = 48
fisher, delta, inputs = ((ctypes.c_float * n)() for n in (rows * columns, *[positions * 48] * 2))
delta[:96] = inputs[:96] = [1.0] * 96
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + megabytes * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    extension.segment_outer_square_cpu(
        fisher=ctypes.addressof(fisher), delta=ctypes.addressof(delta),
        inputs=ctypes.addressof(inputs), offsets=0, offset_bytes=0, length=positions, probes=1,
        positions=positions, segments=1, rows=rows, columns=columns, precision=0, threads=8,
    )
except MemoryError:
    print("MemoryError")
else:
    print(set(fisher))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
@pytest.mark.parametrize(
    "positions, megabytes, said",
    [(2, 0, "{4.0}"), (2, 20, "{4.0}"), (2, 40, "{4.0}"), (400_000, 20, "MemoryError")],
)
def test_a_process_short_of_memory_gets_an_answer(
    positions: int, megabytes: int, said: str
) -> None:
    """No room for the stacks of some threads, or for what any of them needs."""
    built = build.load_extension()
    if built is None:
        pytest.skip(NO_EXTENSION)
    command = [sys.executable, "-c", CRAMPED, built.__file__, str(positions), str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr


def test_without_rows_or_columns_there_is_nothing_to_do() -> None:
    built = build.load_extension()
    if built is None:
        pytest.skip(NO_EXTENSION)
    offsets = torch.tensor([0, 3, 7])
    for rows, columns in ((0, 4), (4, 0), (0, 0)):
        fisher = torch.empty(rows, columns)
        delta, inputs = torch.ones(2, 7, rows), torch.ones(7, columns)
        _extension.segment_outer_square_(built, fisher, delta, inputs, offsets)
