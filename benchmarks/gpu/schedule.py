"""Units in processes of their own, many at once, each with its own limit; nothing stops the rest.

The parent has imported the package and forks: a unit then starts in milliseconds. It must never
touch CUDA itself, which does not survive a fork.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu import units
from benchmarks.gpu.day import Day, append, lines
from benchmarks.gpu.tools import child
from benchmarks.gpu.units import Unit

# Between two looks at what has ended.
TICK = 0.02


@dataclasses.dataclass
class Running:
    unit: Unit
    started: float
    until: float


class Schedule:
    """The units of a part until they are done, the budget is spent or a signal comes."""

    def __init__(
        self,
        day: Day,
        waiting: Sequence[Unit],
        workers: int,
        budget: float,
        *,
        fork: bool = True,
    ) -> None:
        self.fork = fork
        self.day, self.waiting, self.workers = day, list(waiting), workers
        self.started = time.monotonic()
        self.end = self.started + budget
        self.phase_end = self.started + budget * units.UNTIL.get(day.part, 1.0)
        self.running: dict[int, Running] = {}
        self.ended: set[str] = set()
        self.stopped = False
        self.looked = self.started

    def stop(self, *_: object) -> None:
        """A signal's handler: the loop sees to it."""
        self.stopped = True

    def run(self) -> None:
        phase = min((unit.phase for unit in self.waiting), default=0)
        while (self.waiting or self.running) and not self._over():
            if phase == 0 and self._phase_over():
                self._kill("the end of the checks' time")
                phase = 1
            self._start(phase)
            self._collect()
            time.sleep(TICK)
        self._kill("a signal" if self.stopped else "the end of the budget")
        for unit in self.waiting:
            self._note(unit, 0.0, "not run: the time was over", ok=None)

    def _over(self) -> bool:
        return self.stopped or time.monotonic() >= self.end

    def _phase_over(self) -> bool:
        """Where time is up, or nothing of phase 0 is left."""
        left = any(u.phase == 0 for u in self.waiting) or bool(self.running)
        return not left or (not self.day.dry and time.monotonic() >= self.phase_end)

    def _start(self, phase: int) -> None:
        for unit in list(self.waiting):
            if len(self.running) >= self.workers:
                return
            late = unit.phase < phase  # left over: it comes after all that is timed
            wait = unit.after is not None and unit.after not in self.ended
            known = unit.after is not None and self._known(unit.after)
            if unit.phase > phase or (wait and known):
                continue
            if late and (self.running or any(u.phase == phase for u in self.waiting)):
                continue
            self.waiting.remove(unit)
            self._fork(unit)

    def _known(self, name: str) -> bool:
        """Whether a unit waited for is still to come; one that is not is not waited for."""
        coming = [*self.waiting, *(running.unit for running in self.running.values())]
        return any(unit.name == name for unit in coming)

    def _fork(self, unit: Unit) -> None:
        now = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _child(self.day, unit.name, self.fork)
        with contextlib.suppress(PermissionError):  # it may have done so, or be gone
            os.setpgid(pid, pid)
        self.running[pid] = Running(unit, now, min(now + unit.limit, self.end))

    def _collect(self) -> None:
        now = time.monotonic()
        since, self.looked = now - self.looked, now
        for pid, running in list(self.running.items()):
            if self.day.waits(pid):
                running.until = min(running.until + since, self.end)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self._finish(pid, _said(status, self.day.log(running.unit.name)))
            elif time.monotonic() >= running.until:
                self._end(pid, f"ended at its limit of {running.unit.limit:g} s")

    def _kill(self, reason: str) -> None:
        for pid in list(self.running):
            self._end(pid, f"ended by {reason}")

    def _end(self, pid: int, reason: str) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._finish(pid, reason)

    def _finish(self, pid: int, reason: str | None) -> None:
        running = self.running.pop(pid)
        self.ended.add(running.unit.name)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what it left behind
        self._note(running.unit, time.monotonic() - running.started, reason, ok=reason is None)

    def _note(self, unit: Unit, seconds: float, reason: str | None, ok: bool | None) -> None:
        """The parent's own line: without a device, which only a unit may ask for."""
        line = {"unit": unit.name, "ok": ok, "s": round(seconds, 2), "reason": reason}
        append(self.day.out / "units.jsonl", line)


def _said(status: int, log: Path) -> str | None:
    """What is wrong with a process that ended so, with its last words, None where nothing is."""
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return None
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
    return ": ".join([f"ended with status {code}", *last])[:300]


def forks_work(day: Day) -> bool:
    """Whether a fork can use the GPU; else units start as processes that import anew."""
    if day.dry:
        return True
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            import torch

            torch.ones(1, device="cuda").item()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _child(day: Day, name: str, fork: bool) -> None:
    """Never returns. What it prints goes to a file of its own."""
    code = 1
    try:
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        log = os.open(
            day.log(name),
            os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
            0o644,
        )
        os.dup2(log, 1)
        os.dup2(log, 2)
        if not fork:
            command = child(day, name)
            os.execv(command[0], command)
        units.run(day, name)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def unit_states(day: Day) -> dict[str, tuple[bool | None, str]]:
    """By unit: whether it was right (None: not run) and why not, of its process and its lines."""
    states: dict[str, tuple[bool | None, str]] = {}
    for line in lines(day.out / "units.jsonl"):
        states[line["unit"]] = (line["ok"], line["reason"] or "")
    for path in sorted(day.out.glob("*.jsonl")):
        for line in lines(path):
            if line.get("ok") is False and path.name != "units.jsonl":
                reason = states.get(line["unit"], (False, ""))[1] or _why(line)
                states[line["unit"]] = (False, reason)
    return states


def _why(line: dict) -> str:
    if line.get("exception"):
        return line["exception"]
    if "of_allowed" in line:
        return f"{line.get('what')}: {line['of_allowed']:.3g} of what is allowed"
    return f"{line.get('what')} {line.get('said') or ''}".strip()


def on_signals(handler: Callable[..., None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
