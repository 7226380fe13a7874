"""Weights that merge a run's checkpoints into what a decayed learning rate would have given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fisherkern.checks import check_choice, check_count, takes_numpy

#: The factor of the learning rate after a share t of the decay, from 1 at 0 to 0 at 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "1-sqrt": lambda t: 1 - math.sqrt(t),
}
#: Words for `weights` of `merge`.
DECAYS = tuple(f"{schedule}-decay" for schedule in SCHEDULES)


@takes_numpy
def decay_weights(count: int, schedule: str = "1-sqrt") -> list[float]:
    """Return the weights by which a run's checkpoints merge into a decayed run.

    Let theta_0 .. theta_{M-1} be checkpoints of a run at a constant rate, the oldest first and as
    far apart as each other, and u_i = theta_i - theta_{i-1} what the training did between two. Had
    the rate been w_i of the constant one meanwhile, with the same gradients, the run would have
    ended at

        theta_0 + sum_{i=1}^{M-1} w_i u_i = sum_{j=0}^{M-1} c_j theta_j,   c_j = w_j - w_{j+1},

    with w_0 = 1 and w_M = 0. Here w_i = d(i / M), and d falls from 1 to 0: the weights sum to 1,
    none is negative, and their sum over the checkpoints from the i-th on is w_i. A linear decay is
    the plain average, "1-sqrt" counts the first more, "cosine" those in the middle.

    `merge(checkpoints, weights="1-sqrt-decay")` has the same weights.

    Args:
        count: M, the number of checkpoints.
        schedule: d(t): "linear" 1 - t, "cosine" (1 + cos(pi t)) / 2, "1-sqrt" 1 - sqrt(t).

    Returns:
        M numbers, the oldest checkpoint's first.

    Raises:
        InputError: a count below 1 or an unknown schedule.

    Source:
        WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM Pre-training,
        ICLR 2026, arXiv 2507.17634.

    Examples:
        >>> import fisherkern as fk
        >>> fk.decay_weights(4, "linear")
        [0.25, 0.25, 0.25, 0.25]
        >>> [round(weight, 3) for weight in fk.decay_weights(4, "1-sqrt")]
        [0.5, 0.207, 0.159, 0.134]
    """
    check_count("count", count)
    check_choice("schedule", schedule, SCHEDULES)
    factor = SCHEDULES[schedule]
    factors = [1.0, *(factor(i / count) for i in range(1, count)), 0.0]
    return [factors[j] - factors[j + 1] for j in range(count)]


def decayed(weights: Any, members: Sequence[Any]) -> Any:
    """Return `weights`, a decay's name made numbers."""
    if isinstance(weights, str) and weights in DECAYS:
        return decay_weights(len(members), weights.removesuffix("-decay"))
    return weights
