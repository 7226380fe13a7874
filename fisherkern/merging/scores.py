"""The score of a model, as a function of the user's gives it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fisherkern import processes
from fisherkern.errors import InputError, shown


def finite_score(score: Callable[[Any], float], model: Any, what: str) -> float:
    """Return the score of a model, which all processes find.

    Raises:
        InputError: `score` gave no finite number, or other ones in other processes; of `what`.
    """
    with processes.together():
        given = score(model)
        try:
            value = float(given)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"the score {what} is {shown(given)}, not a finite number") from None
    value = processes.agreed(f"the score {what}", value)
    if not math.isfinite(value):
        raise InputError(f"the score {what} is {value}, not a finite number")
    return value
