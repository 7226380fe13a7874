"""What made a file: versions, and the commit of the source where git knows it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent


@functools.cache
def package_version() -> str:
    """Return the installed version, "unknown" for a source tree that is only on the path."""
    try:
        return importlib.metadata.version("fisherkern")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str | None]:
    """Versions of fisherkern, torch and Python, and `source_commit()`."""
    return {
        "fisherkern": package_version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": source_commit(),
    }


@functools.cache
def source_sha256(package: Path = PACKAGE) -> str:
    """Return the sha256 (64 hex digits) of `package`'s Python files and their names."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def source_commit(package: Path = PACKAGE) -> str | None:
    """Return the git commit of `package`'s source, with "-dirty" if files differ from it.

    An installed package has it from its wheel, in commit.txt. None without that and git, or where
    the package lies outside a checkout of its own: one installed into a virtual environment inside
    somebody's project is not that project's commit.
    """
    if (built := package / "commit.txt").exists():
        return built.read_text(encoding="utf-8")
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top) != package.parent:
        return None
    return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    # Reading must not take the index lock from a git command of the user's.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
