"""What every unit of a GPU day is given: folders, device, and a file for its lines."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Ignored by git, filled by `gpu_day.py --prepare`, and to be taken along to the GPU's machine.
CARRIED = ROOT / "build" / "gpu_carry"
# Logs, traces and caches: what of it fits goes into the archive.
WORK = ROOT / "build" / "gpu_day"


@dataclasses.dataclass(frozen=True)
class Day:
    """One run of one part.

    `out` holds a few files of JSON lines and the archive, and nothing else, because only few
    files come back from a lent machine; `work` holds everything beside them.
    """

    part: str
    out: Path
    work: Path
    carried: Path = CARRIED
    dry: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def log(self, unit: str) -> Path:
        """What that unit printed."""
        return self.work / (unit.replace(":", ".") + ".log")

    def emit(self, file: str, **line: Any) -> None:
        """Append a JSON line to out/<file>.jsonl, on the disk before this returns."""
        about = {"device": device_name(self.dry), "arch": architecture(self.dry)}
        append(self.out / f"{file}.jsonl", {**line, **about})

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other unit is inside: what is timed here shares the GPU with nothing.

        The lock goes with the process that holds it, so a unit that hangs keeps it no longer
        than its limit, in which waiting does not count: see `waits`.
        """
        with (self.work / "alone.lock").open("w") as lock:
            mark = self._mark(os.getpid())
            mark.touch()
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            finally:
                mark.unlink(missing_ok=True)
            yield

    def waits(self, pid: int) -> bool:
        """Whether that unit's process is waiting to be alone."""
        return self._mark(pid).exists()

    def _mark(self, pid: int) -> Path:
        return self.work / f"waiting.{pid}"


def append(path: Path, line: dict[str, Any]) -> None:
    """One write of one line, so that lines of several processes do not mix."""
    text = json.dumps({key: _finite(value) for key, value in line.items()})
    with path.open("a") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: an error that is neither is a large one."""
    return 1e30 if isinstance(value, float) and not math.isfinite(value) else value


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, none where there is no file. A torn last line is left out."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


@functools.cache
def device_name(dry: bool) -> str:
    if dry:
        return "interpreter"
    import torch

    return torch.cuda.get_device_name()


@functools.cache
def architecture(dry: bool) -> int:
    """90 for compute capability 9.0; 0 where nothing ran on a GPU."""
    if dry:
        return 0
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
