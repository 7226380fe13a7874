"""Which items a target is ranked against, where that is not the whole catalogue."""

from __future__ import annotations

import numpy as np

from fisherkern.errors import InputError

NUM_NEGATIVES = 100
_KEYS = 1 << 22  # numbers drawn at once
CANDIDATES = ("full", "uniform-100", "popular-100", "top-popular-100")


def sample_negatives(
    kind: str,
    users: np.ndarray,
    forbidden: tuple[np.ndarray, np.ndarray],
    popularity: np.ndarray,
    seed: int,
) -> np.ndarray:
    """100 distinct candidates a user, none of them forbidden.

    kind "uniform-100": uniformly drawn; "popular-100": drawn without replacement in
    proportion to popularity (BERT4Rec's protocol); "top-popular-100": the 100 most
    popular ones, ties to the lower id (EMKD's protocol). The draw of user u depends on
    (seed, u) and the catalogue alone, not on the batch or the model.

    users (N,) int64; forbidden = (row, item) pairs, each (E,) int64; popularity (V,)
    counts of items 1..V. Returns (N, 100) int64 items; allocates 2^22 keys or V, whichever is more.
    Raises InputError when a user has fewer than 100 items to draw from.
    """
    check_enough(kind, users, forbidden, popularity)
    num_items = len(popularity)
    if kind == "top-popular-100":
        keys_of = np.empty(num_items)
        keys_of[np.argsort(-popularity, kind="stable")] = np.arange(num_items)
    else:
        keys_of = np.ones(num_items) if kind == "uniform-100" else popularity.astype(np.float64)
    row, item = forbidden
    found = np.empty((len(users), NUM_NEGATIVES), np.int64)
    block = max(1, _KEYS // num_items)
    for first in range(0, len(users), block):
        own = users[first : first + block]
        if kind == "top-popular-100":
            keys = np.tile(keys_of, (len(own), 1))
        else:
            keys = _race(own, keys_of, seed)
        inside = (row >= first) & (row < first + block)
        keys[row[inside] - first, item[inside] - 1] = np.inf
        lowest = np.argpartition(keys, NUM_NEGATIVES - 1, axis=1)[:, :NUM_NEGATIVES]
        found[first : first + block] = lowest + 1
    return found


def _race(users: np.ndarray, weight: np.ndarray, seed: int) -> np.ndarray:
    """Exponential races (N, V), of rates `weight` (V,).

    The S smallest of E_v / weight_v, E_v ~ Exp(1), are a draw without replacement in proportion to
    the weights (the Gumbel top-k trick).
    """
    keys = np.empty((len(users), len(weight)))
    for draw, user in zip(keys, users, strict=True):
        np.random.default_rng((seed, int(user))).standard_exponential(out=draw)
    with np.errstate(divide="ignore"):
        keys /= weight
    return keys


def check_enough(
    kind: str,
    users: np.ndarray,
    forbidden: tuple[np.ndarray, np.ndarray],
    popularity: np.ndarray,
) -> None:
    """Raise InputError where a user has fewer than 100 items to draw from; see above."""
    drawn = popularity > 0 if kind == "popular-100" else np.ones(len(popularity), dtype=bool)
    row, item = forbidden
    pairs = np.unique(row * len(popularity) + item - 1)
    taken = pairs[drawn[pairs % len(popularity)]] // len(popularity)
    available = drawn.sum() - np.bincount(taken, minlength=len(users))
    if len(users) and available.min() < NUM_NEGATIVES:
        user = users[available.argmin()]
        raise InputError(
            f'candidates="{kind}" needs {NUM_NEGATIVES} unseen items for every user, '
            f"user number {user} has {available.min()}"
        )
