"""What a merge's folder and the files that it names say of the merge."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fisherkern.documents import MAX_SETTINGS
from fisherkern.errors import InputError
from fisherkern.evaluation import Comparison, Report, compare
from fisherkern.files import is_file, read_json
from fisherkern.fisher import DiagFisher
from fisherkern.report.measures import of_users


class _FileIdentity(msgspec.Struct):
    sha256: str | None = None


class _Catalogue(msgspec.Struct):
    owners: dict[str, int] = {}


class _Merge(msgspec.Struct):
    """What `merge` and `merge_files` report."""

    method: str
    weights: list[float] | dict[str, list[float]]
    options: dict[str, Any] = {}
    floor: float | None = None
    normalize: str | None = None
    items: dict[str, int] = {}
    coverage: dict[str, list[float]] = {}
    catalogue: _Catalogue | None = None
    members: int | list[_FileIdentity] = 0
    fishers: list[_FileIdentity] | None = None
    versions: dict[str, str | None] = {}


class _Inputs(msgspec.Struct):
    fishers: list[str] = []
    base: str | None = None


class MergeResult(msgspec.Struct):
    """The result of `fisherkern merge`, in its folder."""

    arguments: dict[str, Any]
    members: list[str]
    report: _Merge
    used: _Inputs


def read_result(path: Path) -> MergeResult:
    """Read the result of a merge.

    Raises:
        InputError: a file that is missing, or holds anything else.
    """
    if not is_file(path):
        raise InputError(f"{path.parent}: holds no result of `fisherkern merge`")
    try:
        result = msgspec.convert(read_json(path, MAX_SETTINGS), MergeResult)
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: is no result of `fisherkern merge`: {error}") from None
    given, merge = result.report.weights, result.report
    rows = [*(given.values() if isinstance(given, dict) else [given]), *merge.coverage.values()]
    if not result.members or any(len(row) != len(result.members) for row in rows):
        raise InputError(f"{path}: does not have one weight for each of its members")
    return result


@dataclass
class Findings:
    """A merge's result, with what was found beside it and measured of it.

    Args:
        result: what the merge wrote.
        merged: the merged model's file; None where it is not there.
        reports: those of the models that were measured, by name: merge, or the member's number.
        best: the member that is best on validation.
        groups: title -> label -> the merge's report and a member's, both on a group of users.
        paths: of `preflight`, from member to member.
        plane: of `weight_plane`, through the first three members.
        notes: a sentence about each thing that is not known.
    """

    result: MergeResult
    merged: Path | None
    reports: dict[str, Report] = field(default_factory=dict)
    best: str | None = None
    groups: dict[str, dict[str, tuple[Report, Report]]] = field(default_factory=dict)
    paths: list[dict[str, Any]] = field(default_factory=list)
    plane: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The members' numbers."""
        return [str(number) for number in range(len(self.result.members))]

    @property
    def members(self) -> list[Path]:
        """The members' files."""
        return [Path(name) for name in self.result.members]

    def add_group(self, title: str, label: str, member: str, mask: np.ndarray) -> None:
        """Set the merge beside a member on some users, `mask` (num_users,); on two at least."""
        if mask.sum() >= 2:
            pair = of_users(self.reports["merge"], mask), of_users(self.reports[member], mask)
            self.groups.setdefault(title, {})[label] = pair

    def against(self, member: str) -> Comparison | str:
        """Compare the merge with a member; the reason where that cannot be done."""
        if member not in self.reports:
            return "was not measured"
        try:
            return compare(self.reports["merge"], self.reports[member])
        except InputError as error:
            return str(error)

    @functools.cached_property
    def fishers(self) -> list[DiagFisher]:
        """The members' Fishers; none, and a note, where one cannot be read."""
        try:
            return [DiagFisher.load(path) for path in self.result.used.fishers]
        except InputError as error:
            self.notes.append(f"A Fisher could not be read: {error}.")
            return []


def about_model(path: str | Path) -> dict[str, Any]:
    """Read the JSON beside a model file; {} where there is none that can be read."""
    try:
        beside = Path(path).with_suffix(".json")
        content = read_json(beside) if is_file(beside) else {}
    except (InputError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def sha256_of(path: str | Path) -> str | None:
    """Return the sha256 (64 hex digits) of a file; None where it cannot be read."""
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError):
        return None
