"""Is one model better than another: differences paired per user, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from fisherkern.checks import takes_numpy
from fisherkern.errors import InputError
from fisherkern.evaluation.report import Protocol, Report


@dataclass(frozen=True)
class Difference:
    """A mean difference per target, its standard error, and the 95 % interval low to high."""

    mean: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Comparison(Mapping[str, Difference]):
    """Differences by metric name: comparison["ndcg@10"].low."""

    differences: dict[str, Difference]
    protocol: Protocol
    num_users: int

    def __getitem__(self, metric: str) -> Difference:
        return self.differences[metric]

    def __iter__(self) -> Iterator[str]:
        return iter(self.differences)

    def __len__(self) -> int:
        return len(self.differences)

    def to_json(self) -> dict[str, Any]:
        """Protocol and differences as plain JSON values."""
        metrics = {metric: asdict(difference) for metric, difference in self.items()}
        return {**asdict(self.protocol), "num_users": self.num_users, "differences": metrics}

    def table(self) -> str:
        """Return the protocol, then a row for each metric: difference, error, interval."""
        lines = [f"{self.protocol}, {self.num_users:,} users, paired"]
        width = max(8, *map(len, self)) + 1
        lines.append(f"{'':<{width}}{'difference':>12}{'std. error':>12}{'95 % interval':>22}")
        for metric, d in self.items():
            interval = f"{d.low:+.4f} to {d.high:+.4f}"
            lines.append(
                f"{metric:<{width}}{d.mean:>+12.4f}{d.standard_error:>12.4f}{interval:>22}"
            )
        return "\n".join(lines)


@takes_numpy
def compare(a: Report, b: Report) -> Comparison:
    """Compare two reports user by user: a minus b, for every metric that both have.

    With d_u = a_u - b_u over n users: mean(d), its standard error sd(d) / sqrt(n) with n - 1 in sd,
    and the 95 % interval mean(d) ± 1.96 standard errors (normal approximation). Where users have
    several targets, d is a target's and users are the clusters of the standard error,

        sqrt(n / (n - 1) Σ_u (Σ_{i of u} (d_i - mean(d)))²) / number of targets.

    Coverage is of all users together and has no interval.

    Args:
        a: the report whose model is claimed to be better.
        b: the report it is compared with, of the same users and protocol.

    Returns:
        The differences by metric name, comparison["ndcg@10"].low, and their table.

    Raises:
        InputError: reports that differ in users or protocol, have no metric in common, or hold
            fewer than two users.

    Examples:
        >>> import torch
        >>> import fisherkern as fk
        >>> data = fk.synthetic(num_users=50, num_items=30, seed=0)
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> model = fk.SASRec(data.num_items, max_len=10, dim=8, layers=1)
        >>> a = fk.evaluate(model, data, seen="keep")
        >>> difference = fk.compare(a, a)["ndcg@10"]
        >>> difference.mean, difference.low, difference.high
        (0.0, 0.0, 0.0)
    """
    for report in (a, b):
        if not isinstance(report, Report):
            raise InputError(f"compare: a {type(report).__name__} is no report of evaluate")
    drawn = a.candidates in ("uniform-100", "popular-100")
    for field in fields(Protocol):
        if field.name == "seed" and not drawn:
            continue
        ours, theirs = getattr(a.protocol, field.name), getattr(b.protocol, field.name)
        if ours != theirs:
            raise InputError(f"compare: the reports differ in {field.name}: {ours} and {theirs}")
    if not np.array_equal(a.users, b.users):
        raise InputError(
            f"compare: the reports are of different users ({a.num_users} and {b.num_users})"
        )
    num_users = a.num_users
    if num_users < 2:
        raise InputError("compare: a paired comparison needs two users or more, got one")
    shared = [metric for metric in a.per_user if metric in b.per_user]
    if not shared:
        raise InputError(f"compare: no metric in common between {list(a)} and {list(b)}")
    differences = {
        metric: _difference(a.per_user[metric] - b.per_user[metric], a.users, num_users)
        for metric in shared
    }
    return Comparison(differences, a.protocol, num_users)


def _difference(d: np.ndarray, users: np.ndarray, num_users: int) -> Difference:
    mean = float(d.mean())
    if num_users == len(d):
        error = float(d.std(ddof=1) / np.sqrt(len(d)))
    else:
        _, user = np.unique(users, return_inverse=True)
        sums = np.bincount(user, weights=d - mean)
        error = float(np.sqrt(num_users / (num_users - 1) * (sums**2).sum()) / len(d))
    return Difference(mean, error, mean - 1.96 * error, mean + 1.96 * error)
