"""The one exception type that means "the input is wrong", and the commonest check."""

from collections.abc import Sequence
from typing import Any


class InputError(ValueError):
    """Bad input: a file, a line, a tensor or an argument of the user's.

    The message is one sentence that names what is wrong and where. The command
    line prints it alone and exits with status 2; anything else is a bug of ours.
    """


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise InputError unless `value`, of the argument `name`, is one of `choices`."""
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise InputError(f"{name} must be {expected}, got {value!r}")
