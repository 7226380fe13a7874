"""Made-up sequences whose next item depends on the last two, not on popularity alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fisherkern.checks import check_count, check_not_negative, check_unit, takes_numpy
from fisherkern.data.dataset import SequenceDataset

_START, _YEAR, _DAY = 1_600_000_000, 365 * 86_400, 86_400  # seconds
_BLOCK_USERS = 1024  # bounds the memory for what each user has seen


@takes_numpy
def synthetic(
    num_users: int = 2000,
    num_items: int = 500,
    seed: int = 0,
    *,
    clusters: int = 16,
    tastes: int = 3,
    min_length: int = 20,
    max_length: int = 60,
    order: float = 0.8,
    skew: float = 1.0,
) -> SequenceDataset:
    """Make sequences over a clustered catalogue with popularity skew and order-2 transitions.

    The item of popularity rank r has weight r^-skew (Zipf), and every item is in one of `clusters`
    clusters of equal size, drawn at random. Let a and b be the clusters of a user's last and
    last-but-one item. With probability `order` the next item's cluster is a + 1 (cyclic) when a =
    b, and a otherwise: two of a cluster, then on to the next. So a alone leaves two clusters about
    equally likely, and b decides. Else the cluster is one of the user's `tastes` favourites, drawn
    by weight once per user: without them a Transformer takes far longer to find the order. Inside
    the cluster, items are drawn by weight among those the user has not had yet (among all, once
    there are none). Users come at random in a year and act once a day on average; what they take
    does not depend on the time.

    Args:
        num_users: sequences.
        num_items: V, at least `clusters`.
        seed: the same arguments give the same data.
        clusters: at least 2, and at least `tastes`.
        tastes: favourite clusters of a user.
        min_length: shortest sequence, at least 3; lengths are uniform.
        max_length: longest sequence.
        order: probability in [0, 1] that the last two items decide the next cluster.
        skew: exponent of the popularity, 0 or more.

    Returns:
        The sequences: item ids "1".."V", user ids "1".., attributes {item: [cluster from 1]},
        times in seconds since 1970.

    Raises:
        InputError: impossible sizes.
    """
    for name, value, least in (
        ("num_users", num_users, 1),
        ("tastes", tastes, 1),
        ("clusters", clusters, max(2, tastes)),
        ("num_items", num_items, clusters),
        ("seed", seed, 0),
        ("min_length", min_length, 3),
        ("max_length", max_length, min_length),
    ):
        check_count(name, value, least)
    check_unit("order", order)
    check_not_negative("skew", skew)
    random = np.random.default_rng(seed)
    cluster = random.permutation(np.arange(num_items) % clusters)
    log_weight = -skew * np.log1p(random.permutation(num_items))
    lengths = random.integers(min_length, max_length, size=num_users, endpoint=True)
    blocks = []
    for first in range(0, num_users, _BLOCK_USERS):
        block = lengths[first : first + _BLOCK_USERS]
        walks = _walk(random, len(block), int(block.max()), cluster, log_weight, tastes, order)
        blocks.append(walks[np.arange(walks.shape[1]) < block[:, None]])
    return SequenceDataset(
        "synthetic",
        np.concatenate(blocks) + 1,
        np.concatenate([[0], np.cumsum(lengths)]),
        [str(item) for item in range(1, num_items + 1)],
        [str(user) for user in range(1, num_users + 1)],
        {str(item): [int(group) + 1] for item, group in enumerate(cluster, start=1)},
        _times(np.random.default_rng([seed, 1]), lengths),
    )


def _times(random: np.random.Generator, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """(num_actions,) seconds since 1970: a start for each user, then gaps."""
    ends = np.cumsum(lengths)
    passed = np.cumsum(np.ceil(random.exponential(_DAY, ends[-1])).astype(np.int64))
    starts = _START + random.integers(0, _YEAR, len(lengths)) - passed[ends - lengths]
    return passed + np.repeat(starts, lengths)


def _walk(
    random: np.random.Generator,
    num_users: int,
    length: int,
    cluster: NDArray[np.int64],
    log_weight: NDArray[np.float64],
    tastes: int,
    order: float,
) -> NDArray[np.int64]:
    """(num_users, length) items from 0, one step of all users at a time."""
    clusters = int(cluster.max()) + 1
    mass = np.bincount(cluster, weights=np.exp(log_weight), minlength=clusters)
    # Row c holds the items of cluster c, the shorter rows filled up with no item at all.
    members = np.full((clusters, int(np.bincount(cluster).max())), -1)
    for row in range(clusters):
        inside = np.flatnonzero(cluster == row)
        members[row, : len(inside)] = inside
    member_weight = np.where(members >= 0, log_weight[members], -np.inf)
    users = np.arange(num_users)
    # The largest of log-weight plus Gumbel noise are draws in proportion to the weights.
    noisy = np.log(mass) + random.gumbel(size=(num_users, clusters))
    favourites = np.argsort(-noisy, axis=1)[:, :tastes]
    seen = np.zeros((num_users, len(cluster)), bool)
    items = np.empty((num_users, length), np.int64)
    for step in range(length):
        group = favourites[users, random.integers(0, tastes, size=num_users)]
        if step >= 2:
            last, before = cluster[items[:, step - 1]], cluster[items[:, step - 2]]
            follow = random.random(num_users) < order
            coming = np.where(last == before, (last + 1) % clusters, last)
            group = np.where(follow, coming, group)
        weight = np.where(seen[users[:, None], members[group]], -np.inf, member_weight[group])
        exhausted = ~np.isfinite(weight).any(axis=1)
        weight[exhausted] = member_weight[group[exhausted]]
        best = np.argmax(weight + random.gumbel(size=weight.shape), axis=1)
        items[:, step] = members[group, best]
        seen[users, items[:, step]] = True
    return items
