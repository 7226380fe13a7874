"""Docstrings of the public API: their examples run, and every argument has its line."""

import doctest
import importlib
import inspect
import re

import pytest

import fisherkern as fk

EXAMPLES = (
    "fisherkern.data.loading",
    "fisherkern.evaluation.compare",
    "fisherkern.evaluation.ranking",
)
# A list that only grows: the rooms whose public names keep the form.
ROOMS = ("data", "training", "objectives", "encoders", "evaluation")


def public(room: str) -> list[str]:
    """The names of `fk.__all__` that are functions or classes of a room."""
    named = {name: getattr(fk, name) for name in fk.__all__}
    begin = f"fisherkern.{room}"
    return sorted(name for name, it in named.items() if it.__module__.startswith(begin))


def arguments(documented: object) -> list[str]:
    """What a caller may give: fields that the printed form leaves out are not among it."""
    hidden = {
        field.name
        for field in getattr(documented, "__dataclass_fields__", {}).values()
        if not field.repr
    }
    names = inspect.signature(documented).parameters
    return [name for name in names if name not in hidden]


def missing(documented: object) -> list[str]:
    """The arguments without a line under "Args:"."""
    text = inspect.getdoc(documented) or ""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", text, re.MULTILINE)
    lines = re.findall(r"^    \*{0,2}(\w+): ", section[1] if section else "", re.MULTILINE)
    return [name for name in arguments(documented) if name not in lines]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_give_what_they_say(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


@pytest.mark.parametrize("name", [name for room in ROOMS for name in public(room)])
def test_every_argument_has_a_line(name):
    assert missing(getattr(fk, name)) == []


def test_a_missing_line_is_seen():
    def right(a: int, *, b: int = 0, **more: int) -> None:
        """Do it.

        Args:
            a: one.
                b: not this one.
            **more: others.

        Returns:
            b: nor this.
        """

    assert missing(right) == ["b"]
    assert missing(lambda a: a) == ["a"]
