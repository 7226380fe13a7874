"""Validators of arguments: each raises InputError with one sentence that names the argument."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from fisherkern.errors import InputError, shown

MOST = 2**63 - 1  # what every library below can count to

CallParameters = ParamSpec("CallParameters")
Result = TypeVar("Result")


def takes_numpy(function: Callable[CallParameters, Result]) -> Callable[CallParameters, Result]:
    """Make a public function take NumPy's numbers for Python's, which never overflow.

    As arguments, and inside lists, tuples and mappings that are arguments.
    """

    @functools.wraps(function)
    def called(*args: CallParameters.args, **kwargs: CallParameters.kwargs) -> Result:
        given: Any = [_plain(value) for value in args]
        named: Any = {name: _plain(value) for name, value in kwargs.items()}
        return function(*given, **named)

    return called


def check_loader(loader: Any) -> None:
    """Raise InputError for what cannot give batches: a single batch, a name, nothing."""
    rows = getattr(loader, "ndim", 3) < 3  # of a tensor: a loop would give its rows
    if rows or isinstance(loader, str | bytes | os.PathLike | Mapping):
        raise InputError(
            f"loader: a {type(loader).__name__} is no loader; give batches one after another, such "
            "as [batch]"
        )
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise InputError(f"loader: a {type(loader).__name__} gives no batches")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.shape == ()):
        return value.item()
    numbers = isinstance(value, list | tuple) and any(isinstance(v, np.generic) for v in value)
    if numbers and type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if type(value) is dict and any(isinstance(v, np.generic) for v in value.values()):
        return {key: _plain(own) for key, own in value.items()}
    return value


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise InputError unless `value` is an integer, Python's or NumPy's, of `least` to `MOST`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{name} must be an integer, got {shown(value)}")
    if value < least:
        bound = f"be at least {least}" if least else "not be negative"
        raise InputError(f"{name} must {bound}, got {shown(value)}")
    if value > MOST:
        raise InputError(f"{name} must be below 2^63, got {shown(value)}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise InputError unless `value` is one of `choices`."""
    choices = list(choices)  # in which a value that has no hash is looked for as well
    if value not in choices:
        raise InputError(f"{name} must be {' or '.join(map(shown, choices))}, got {shown(value)}")


def check_callable(name: str, value: Any) -> None:
    """Raise InputError for an argument that is neither None nor a function."""
    if value is not None and not callable(value):
        raise InputError(f"{name}: a {type(value).__name__} is no function")


def check_positive(name: str, value: Any) -> None:
    """Raise InputError unless `value` is a finite number above 0."""
    if not (_is_number(value) and 0 < value < math.inf):
        raise InputError(f"{name} must be positive and finite, got {shown(value)}")


def check_not_negative(name: str, value: Any) -> None:
    """Raise InputError unless `value` is a finite number, 0 or more."""
    if not (_is_number(value) and 0 <= value < math.inf):
        raise InputError(f"{name} must be 0 or more and finite, got {shown(value)}")


def check_unit(name: str, value: Any, interval: str = "[0, 1]") -> None:
    """Raise InputError unless `value` lies between 0 and 1: "[0, 1]", "[0, 1)" or "(0, 1]"."""
    inside = _is_number(value) and 0 <= value <= 1
    if not inside or (value == 0 and interval[0] == "(") or (value == 1 and interval[-1] == ")"):
        raise InputError(f"{name} must be in {interval}, got {shown(value)}")


def _is_number(value: Any) -> bool:
    numeric = isinstance(value, int | float | np.integer | np.floating)
    return numeric and not isinstance(value, bool)


def device_named(name: str) -> torch.device:
    """Return the device of a --device.

    Raises:
        InputError: a name of no device, or of one that is not there.
    """
    if re.fullmatch(r"cpu|cuda(:\d{1,3})?", name) is None:
        raise InputError(f"--device: {shown(name)} is not like cpu, cuda or cuda:1")
    device, there = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise InputError(f"--device: {name} is not here; there are {there} CUDA devices")
    return device
