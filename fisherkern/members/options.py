"""Options of a method: what each may be, read from a function's signature."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fisherkern.errors import InputError, shown


class Domain(Protocol):
    """What an option may be."""

    def allows(self, value: Any) -> bool:
        """Whether `value` lies in the domain."""
        ...

    @property
    def expected(self) -> str:
        """The domain in words, for an error message."""
        ...


@dataclass(frozen=True)
class Number:
    """A finite number of at least `low` (`above`: more than), and at most `high`."""

    low: float
    high: float = math.inf
    above: bool = False

    def allows(self, value: Any) -> bool:
        """See `Domain`."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        inside = self.low < value if self.above else self.low <= value
        return inside and value <= self.high and math.isfinite(value)

    @property
    def expected(self) -> str:
        """See `Domain`."""
        bound = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
        limit = "" if self.high == math.inf else f" and at most {self.high:g}"
        return f"a number {bound}{limit}"


@dataclass(frozen=True)
class Integer:
    """An integer of at least `low`."""

    low: int

    def allows(self, value: Any) -> bool:
        """See `Domain`."""
        return isinstance(value, int) and not isinstance(value, bool) and value >= self.low

    @property
    def expected(self) -> str:
        """See `Domain`."""
        return f"an integer of at least {self.low}"


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Any, ...]

    def allows(self, value: Any) -> bool:
        """See `Domain`."""
        return value in self.values and not isinstance(value, bool)

    @property
    def expected(self) -> str:
        """See `Domain`."""
        return " or ".join(map(repr, self.values))


@dataclass(frozen=True)
class Option:
    """One option of a method: its default, and what it may be."""

    default: Any
    domain: Domain


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """Return the keyword arguments of `function` whose annotations say what they may be.

    An option is annotated as `Literal[...]` or as `Annotated[type, Domain]`. Other arguments are
    left out.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    options = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name)
        if typing.get_origin(hint) is Literal:
            options[name] = Option(parameter.default, Choice(typing.get_args(hint)))
        elif typing.get_origin(hint) is typing.Annotated:
            options[name] = Option(parameter.default, hint.__metadata__[0])  # type: ignore[union-attr]
    return options


def check_option(name: str, value: Any, domain: Domain) -> None:
    """Raise InputError unless `domain` allows `value`."""
    if not domain.allows(value):
        raise InputError(f"{name} is {shown(value)} where {domain.expected} was expected")


def check_options(
    method: str, options: Mapping[str, Option], given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the method's options with defaults filled in.

    Raises:
        InputError: An option is unknown, or a value is not allowed.
    """
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"options is a {type(given).__name__}, not a mapping from names to values")
    values = {name: option.default for name, option in options.items()}
    for name, value in (given or {}).items():
        if name not in options:
            known = ", ".join(options)
            raise InputError(
                f"method {shown(method)} has no option {shown(name)}; "
                + (f"it has {known}" if known else "it has none")
            )
        check_option(f"option {name!r}", value, options[name].domain)
        values[name] = value
    return values
