"""What an evaluation yields: metrics by name, every user's value, and the protocol."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fisherkern.checks import check_choice
from fisherkern.errors import InputError, shown
from fisherkern.evaluation.candidates import CANDIDATES

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Protocol:
    """What was ranked against what; two reports compare only where all of it agrees.

    Args:
        split: "train", "validation" or "test".
        candidates: "full", "uniform-100", "popular-100" or "top-popular-100".
        seen: "exclude", "keep", or "last-N" for an N from 1 on.
        seed: of the drawn candidates; it matters for those alone.
        data_fingerprint: the data set's `fingerprint()`.

    Raises:
        InputError: an unknown choice.
    """

    split: str
    candidates: str
    seen: str
    seed: int
    data_fingerprint: str

    def __post_init__(self) -> None:
        check_choice("split", self.split, SPLITS)
        check_choice("candidates", self.candidates, CANDIDATES)
        if self.seen not in ("exclude", "keep") and self.last is None:
            raise InputError(
                f"seen must be 'exclude' or 'keep' or 'last-N', got {shown(self.seen)}"
            )

    @property
    def last(self) -> int | None:
        """N of seen="last-N"."""
        found = re.fullmatch("last-([1-9][0-9]{0,8})", str(self.seen))
        return None if found is None else int(found[1])

    def __str__(self) -> str:
        if self.candidates != "full":
            return f"{self.split} split, {self.candidates} unseen candidates, seed {self.seed}"
        seen = {"exclude": "seen items excluded", "keep": "seen items kept"}.get(
            self.seen, f"items of the last {self.last} places excluded"
        )
        return f"{self.split} split, full ranking, {seen}"


@dataclass(frozen=True, eq=False, repr=False)
class Report(Mapping[str, float]):
    """Means over users of the ranking metrics, by name: report["ndcg@10"].

    Args:
        per_user: the same names -> (num_users,) float64, aligned with `users`.
        users: (num_users,) int64, indices in the data set.
        ranks: (num_users,) int64, rank of each target from 1.
        protocol: what was ranked against what.
    """

    per_user: dict[str, np.ndarray]
    users: np.ndarray
    ranks: np.ndarray
    protocol: Protocol

    def __getitem__(self, metric: str) -> float:
        return float(self.per_user[metric].mean())

    def __iter__(self) -> Iterator[str]:
        return iter(self.per_user)

    def __len__(self) -> int:
        return len(self.per_user)

    def __repr__(self) -> str:
        values = ", ".join(f"{metric} {value:.4f}" for metric, value in self.items())
        return f"<Report: {self.protocol}, {self.num_users:,} users: {values}>"

    @property
    def num_users(self) -> int:
        """How many users were ranked."""
        return len(self.users)

    @property
    def split(self) -> str:
        """The split of the protocol."""
        return self.protocol.split

    @property
    def candidates(self) -> str:
        """The candidates of the protocol."""
        return self.protocol.candidates

    @property
    def seen(self) -> str:
        """The protocol's treatment of seen items."""
        return self.protocol.seen

    def to_json(self) -> dict[str, Any]:
        """Return the protocol and the means as plain JSON values, without the per-user arrays."""
        return {**asdict(self.protocol), "num_users": self.num_users, "metrics": dict(self)}

    def table(self) -> str:
        """Return the protocol, then a row for each metric and a column for each cut-off."""
        names = list(dict.fromkeys(metric.split("@")[0] for metric in self))
        cutoffs = list(dict.fromkeys(metric.split("@")[1] for metric in self))
        lines = [f"{self.protocol}, {self.num_users:,} users"]
        lines.append(" " * 5 + "".join(f"{'@' + k:>9}" for k in cutoffs))
        for name in names:
            values = "".join(f"{self[f'{name}@{k}']:9.4f}" for k in cutoffs)
            lines.append(f"{name.upper():<5}{values}")
        return "\n".join(lines)
