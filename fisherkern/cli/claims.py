"""The folder that a run writes to: its own while it works, and nothing of anybody else's lost."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fisherkern.documents import MAX_SETTINGS
from fisherkern.errors import InputError, shown
from fisherkern.files import is_file, read_json

# Arguments that change nothing about what comes out of a run.
HARMLESS = ("threads", "quiet", "config", "out", "log_dir", "device")
BESIDE = ("", ".json", ".md")  # endings of what goes with a model file
MODEL_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


class FolderClaim:
    """A run's hold on a folder, a context manager.

    Files that exist already are overwritten only where the folder's result.json, or the
    running-COMMAND.json of a run that was killed, says that the same command made them. While the
    run works the latter is locked, so that a second process is refused.

    Args:
        out: the folder, made if it is missing.
        command: that writes.
        arguments: of the run, as JSON values.
        names: of the files to come.
        inputs: files that the run reads, which it may not write to.
        same_arguments: whether only a run of the same arguments may overwrite what one has made.
    """

    def __init__(
        self,
        out: Path,
        command: str,
        arguments: Mapping[str, Any],
        names: Sequence[str],
        inputs: Iterable[Path],
        *,
        same_arguments: bool,
    ) -> None:
        self.out, self.command, self.same_arguments = out, command, same_arguments
        self.claim = out / f"running-{command}.json"
        self.arguments = {"command": command, **arguments}
        self.targets = [
            path
            for name in names
            for ending in BESIDE
            if not ending or name.endswith(MODEL_ENDINGS)
            for path in [(out / name).with_suffix(ending or Path(name).suffix)]
        ]
        read = [path for path in inputs if path.name]
        self.inputs = [*read, *(path.with_suffix(".json") for path in read)]
        self.handle: int | None = None
        self.made: list[Path] = []

    def __enter__(self) -> FolderClaim:
        for target in self.targets:
            for path in self.inputs:
                inside = target.resolve() in path.resolve().parents
                if inside or (target.exists() and path.exists() and target.samefile(path)):
                    raise InputError(f"{target}: would be written over, and is read; name --out")
        try:
            self._lock()
            self._check_owner()
            text = json.dumps({"arguments": self.arguments}, indent=1)
            self.claim.write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            self._give_back()
            raise InputError(f"{self.out}: could not be written: {error.strerror}") from None
        except InputError:
            self._give_back()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.handle is None:
            return
        with contextlib.suppress(OSError, InputError):
            # What was made before a failure must be known as this command's.
            known = _maker(result_path(self.out, self.command)) is not None
            if known or not any(path.exists() for path in self.targets):
                self.claim.unlink(missing_ok=True)
                self._remove_folders(kind is not None)
        os.close(self.handle)
        self.handle = None

    def _give_back(self) -> None:
        """Leave the folder as it was found; a claim without a word in it is ours."""
        if self.handle is None:
            return
        with contextlib.suppress(OSError):
            if not self.claim.stat().st_size:
                self.claim.unlink()
                self._remove_folders(True)
        os.close(self.handle)
        self.handle = None

    def _remove_folders(self, failed: bool) -> None:
        for folder in self.made if failed else ():
            folder.rmdir()  # where nothing is in it

    def _check_owner(self) -> None:
        """Refuse what the command's last run into this folder, if there was one, did not make."""
        owner = _maker(self.claim) or _maker(result_path(self.out, self.command))
        there = next((path for path in self.targets if path.exists()), None)
        if owner is None and there is not None:
            raise InputError(
                f"{there}: exists, and `fisherkern {self.command}` did not make it; "
                "choose another --out"
            )
        if owner is None or not self.same_arguments:
            return
        for name in sorted(owner.keys() | self.arguments.keys()):
            theirs, ours = owner.get(name), self.arguments.get(name)
            if theirs != ours and name not in HARMLESS and not name.startswith("save_every"):
                raise InputError(
                    f"{self.out}: holds a run with {name} = {shown(theirs)}, not {shown(ours)}; "
                    "choose another --out"
                )

    def _lock(self) -> None:
        folders = (self.out, *self.out.parents)
        self.made = list(itertools.takewhile(lambda folder: not folder.exists(), folders))
        self.out.mkdir(parents=True, exist_ok=True)
        while True:
            self.handle = os.open(self.claim, os.O_RDWR | os.O_CREAT, 0o666)
            if not _locked(self.handle):
                os.close(self.handle)
                self.handle = None
                raise InputError(f"{self.out}: another process is writing there")
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(self.handle).st_ino == self.claim.stat().st_ino:
                    return
            os.close(self.handle)  # its holder removed it before it was ours


def result_path(out: Path, command: str) -> Path:
    """Return the file for a result: result.json, or result-COMMAND.json beside another's."""
    for name in ("result.json", f"result-{command}.json"):
        path = out / name
        if not is_file(path) or (_maker(path) or {}).get("command") == command:
            return path
    raise InputError(f"{path}: `fisherkern {command}` did not make it; choose another --out")


def _maker(path: Path) -> dict[str, Any] | None:
    """Return the arguments of the run that wrote a result or a claim; None where no run did."""
    try:
        content = read_json(path, MAX_SETTINGS) if is_file(path) else None
    except InputError:  # cut short, or somebody else's
        return None
    found = content.get("arguments") if isinstance(content, dict) else None
    known = isinstance(found, dict) and isinstance(found.get("command"), str)
    return found if known else None


def _locked(handle: int) -> bool:
    """Whether the file could be locked, or cannot be locked on this system."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
