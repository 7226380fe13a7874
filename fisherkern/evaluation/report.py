"""What an evaluation yields: metrics by name, every user's value, and the protocol."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
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
        holdout: the name of the data set's split.

    Raises:
        InputError: an unknown choice.
    """

    split: str
    candidates: str
    seen: str
    seed: int
    data_fingerprint: str
    holdout: str = "leave-one-out"

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
        split = f"{self.split} split"
        if self.holdout != "leave-one-out":
            split += f", {self.holdout}"
        if self.candidates != "full":
            return f"{split}, {self.candidates} unseen candidates, seed {self.seed}"
        seen = {"exclude": "seen items excluded", "keep": "seen items kept"}.get(
            self.seen, f"items of the last {self.last} places excluded"
        )
        return f"{split}, full ranking, {seen}"


@dataclass(frozen=True, eq=False, repr=False)
class Report(Mapping[str, float]):
    """Means over targets of the ranking metrics, by name: report["ndcg@10"].

    A user has one target, but for a split by time with successive targets.

    Args:
        per_user: names -> (num_targets,) float64, aligned with `users`.
        users: (num_targets,) int64, indices in the data set.
        ranks: (num_targets,) int64, rank of each target from 1.
        protocol: what was ranked against what.
        coverage: names -> share of the catalogue, where `evaluate` was asked for it.
    """

    per_user: dict[str, np.ndarray]
    users: np.ndarray
    ranks: np.ndarray
    protocol: Protocol
    coverage: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> float:
        if metric in self.coverage:
            return self.coverage[metric]
        return float(self.per_user[metric].mean())

    def __iter__(self) -> Iterator[str]:
        yield from self.per_user
        yield from self.coverage

    def __len__(self) -> int:
        return len(self.per_user) + len(self.coverage)

    def __repr__(self) -> str:
        values = ", ".join(f"{metric} {value:.4f}" for metric, value in self.items())
        return f"<Report: {self.headline()}: {values}>"

    @property
    def num_users(self) -> int:
        """How many users were ranked."""
        return len(np.unique(self.users))

    def headline(self) -> str:
        """Return the protocol and how many users, and targets if more, were ranked."""
        targets = "" if len(self.users) == self.num_users else f", {len(self.users):,} targets"
        return f"{self.protocol}, {self.num_users:,} users{targets}"

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
        about = {**asdict(self.protocol), "num_users": self.num_users}
        return {**about, "num_targets": len(self.users), "metrics": dict(self)}

    def table(self) -> str:
        """Return the protocol, then a row for each metric and a column for each cut-off."""
        names = list(dict.fromkeys(metric.split("@")[0] for metric in self))
        cutoffs = list(dict.fromkeys(metric.split("@")[1] for metric in self))
        width = max(4, *map(len, names)) + 1
        lines = [self.headline(), " " * width + "".join(f"{'@' + k:>9}" for k in cutoffs)]
        for name in names:
            values = "".join(f"{self[f'{name}@{k}']:9.4f}" for k in cutoffs)
            lines.append(f"{name.upper():<{width}}{values}")
        return "\n".join(lines)
