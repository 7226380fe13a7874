"""Mutated inputs to readers, one after another, each within its time and memory."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.fuzz.mutations import mutated
from tests.fuzz.readers import READERS, copied, listing, outcome

SECONDS, MEGABYTES = 5, 500
CORPUS = Path(__file__).parent / "corpus"


class TooLongError(BaseException):
    """No Exception, so that nothing in a reader takes it for its own."""


@dataclass
class Findings:
    """What came out: how many inputs were read and refused, and what went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLongError(f"longer than {SECONDS} s")

    # Seconds of this process's work, as others may be at work beside it; who waits does none.
    before = [signal.signal(own, stop) for own in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(6 * SECONDS)
    # What hangs in C code hears no signal: end the process and say where.
    faulthandler.dump_traceback_later(20 * SECONDS, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for own, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(own, handler)
        faulthandler.cancel_dump_traceback_later()


def _peak() -> int:
    """Return the largest memory of this process since `_forget_peak`, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def check(name: str, folder: Path, findings: Findings) -> str | None:
    """Call one reader on the files of `folder`; return what was wrong."""
    before, handles = listing(folder), len(list(Path("/proc/self/fd").iterdir()))
    _forget_peak()
    memory, started, fault = _peak(), time.process_time(), None
    try:
        with _limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            findings.counts[outcome(READERS[name], folder)] += 1
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  # all of it is what this looks for
        fault = traceback.format_exc()
    seconds, used = time.process_time() - started, _peak() - memory
    if fault is None and seconds > SECONDS:
        fault = f"took {seconds:.1f} s"
    if fault is None and used > MEGABYTES * 10**6:
        fault = f"took {used / 1e6:.0f} MB"
    more = sorted(set(listing(folder)) - set(before))
    if fault is None and more:
        fault = f"left {more}"
    if fault is None and len(list(Path("/proc/self/fd").iterdir())) > handles + 8:
        fault = "left files open"
    return fault


def fuzz(names: Sequence[str], inputs: int, seed: int, seconds: float, keep: bool) -> Findings:
    """Give each reader `inputs` mutated inputs, or as many as `seconds` allow for all.

    Args:
        names: readers.
        inputs: of each.
        seed: the same one gives the same inputs.
        seconds: for all of them together.
        keep: store what failed in the corpus.
    """
    findings, end = Findings(), time.monotonic() + seconds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        for place, name in enumerate(names):
            whole, work = Path(scratch, "whole"), Path(scratch, "work")
            for folder in (whole, work):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            files = READERS[name].make(whole)
            share = (end - time.monotonic()) / (len(names) - place)
            stop = time.monotonic() + share
            for number in range(inputs):
                if time.monotonic() > stop:
                    break
                draw = random.Random(f"{seed} {name} {number}")
                file = draw.choice(files)
                content = mutated((whole / file).read_bytes(), draw)
                copied(whole, work)
                (work / file).write_bytes(content)
                fault = check(name, work, findings)
                findings.counts["all"] += 1
                if fault is not None:
                    findings.faults.append(f"{name}, {file}, seed {seed}, {number}:\n{fault}")
                    print(findings.faults[-1], file=sys.stderr, flush=True)
                    if keep:
                        digest = hashlib.sha256(content).hexdigest()[:12]
                        target = CORPUS / name / f"{digest}--{file.replace('/', '--')}"
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(content)
    return findings
