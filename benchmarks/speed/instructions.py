"""Instructions instead of seconds: a process under callgrind counts its own.

Seconds of a shared machine are noise; the instructions of a call are the same on every run. They
are those of a processor with AVX2, which is what valgrind knows, and say nothing of caches.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from fisherkern.errors import InputError

_REQUESTS = """#include <valgrind/callgrind.h>
void toggle(void) { CALLGRIND_TOGGLE_COLLECT; }
void dump(void) { CALLGRIND_DUMP_STATS; }
"""


def under_callgrind(folder: Path) -> tuple[list[str], list[str]]:
    """What stands before a command whose process counts, and what its counter is made of.

    Raises:
        InputError: there is no valgrind or no C compiler.
    """
    compiler = shutil.which("cc")
    if compiler is None or shutil.which("valgrind") is None:
        raise InputError("--instructions: needs valgrind and a C compiler")
    library = folder / "counter.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=_REQUESTS, text=True, check=True)
    counts = folder / "counts"
    flags = ["--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={counts}.%p", "-q"]
    return ["valgrind", *flags], [str(library), str(counts)]


class InstructionCounter:
    """Counts the instructions of this process, which runs under callgrind."""

    def __init__(self, library: str, counts: str) -> None:
        self.library, self.counts, self.dumps = ctypes.CDLL(library), counts, 0

    def of(self, call: Callable[[], object], count: int) -> int:
        """Of a number of calls, in all threads."""
        self.library.toggle()
        for _ in range(count):
            call()
        self.library.toggle()
        self.library.dump()
        self.dumps += 1
        path = Path(f"{self.counts}.{os.getpid()}.{self.dumps}")
        lines = path.read_text().splitlines()
        path.unlink()
        return int(next(line for line in reversed(lines) if line.startswith("totals:")).split()[1])
