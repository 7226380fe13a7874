"""Which items a target is ranked against, where that is not the whole catalogue."""

from __future__ import annotations

import numpy as np

from fisherkern.errors import InputError

NUM_NEGATIVES = 100
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
    counts of items 1..V. Returns (N, 100) int64 items, allocates (N, V) float64.
    Raises InputError when a user has fewer than 100 items to draw from.
    """
    check_enough(kind, users, forbidden, popularity)
    num_items = len(popularity)
    if kind == "top-popular-100":
        place = np.empty(num_items)
        place[np.argsort(-popularity, kind="stable")] = np.arange(num_items)
        keys = np.tile(place, (len(users), 1))
    else:
        weight = np.ones(num_items) if kind == "uniform-100" else popularity.astype(np.float64)
        # An exponential race: the S smallest of E_v / weight_v, E_v ~ Exp(1), are a draw
        # without replacement in proportion to the weights (the Gumbel top-k trick).
        keys = np.empty((len(users), num_items))
        for draw, user in zip(keys, users, strict=True):
            np.random.default_rng((seed, int(user))).standard_exponential(out=draw)
        with np.errstate(divide="ignore"):
            keys /= weight
    row, item = forbidden
    keys[row, item - 1] = np.inf
    return np.argpartition(keys, NUM_NEGATIVES - 1, axis=1)[:, :NUM_NEGATIVES] + 1


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
