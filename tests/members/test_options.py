"""Options read from a signature, and values checked against what they may be."""

from typing import Annotated, Literal

import pytest

from fisherkern.errors import InputError
from fisherkern.members.options import (
    Choice,
    Integer,
    Number,
    Option,
    check_option,
    check_options,
    options_of,
)


def method(
    block: object,
    *,
    share: Annotated[float, Number(0.0, 1.0, above=True)] = 0.5,
    kind: Literal["a", "b"] = "b",
    plain: int = 3,
) -> None: ...


def test_annotated_arguments_are_options():
    assert options_of(method) == {
        "share": Option(0.5, Number(0.0, 1.0, above=True)),
        "kind": Option("b", Choice(("a", "b"))),
    }


@pytest.mark.parametrize(
    ("domain", "good", "bad", "expected"),
    [
        (Number(0.0), (0, 0.0, 3), (-1e-9, True, "1", None, float("inf"), float("nan")), "0"),
        (Number(0.0, above=True), (1e-9,), (0, 0.0), "a number above 0"),
        (Number(0.0, 1.0), (0, 1), (1.1, -0.1), "of at least 0 and at most 1"),
        (Integer(1), (1, 9), (0, 1.0, True, "1"), "an integer of at least 1"),
        (Choice((1, 2)), (1, 2), (0, True, "1"), "1 or 2"),
        (Choice(("a", "b")), ("a",), ("c", None), "'a' or 'b'"),
    ],
)
def test_domains(domain, good, bad, expected):
    for value in good:
        check_option("x", value, domain)
    for value in bad:
        with pytest.raises(InputError, match=f"^x is {value!r} where .*{expected}.* was expected"):
            check_option("x", value, domain)


def test_defaults_are_filled_in_and_names_checked():
    options = options_of(method)
    assert check_options("m", options, None) == {"share": 0.5, "kind": "b"}
    assert check_options("m", options, {"share": 1}) == {"share": 1, "kind": "b"}
    with pytest.raises(InputError, match="method 'm' has no option 'plain'; it has share, kind"):
        check_options("m", options, {"plain": 1})
    with pytest.raises(InputError, match="method 'm' has no option 'plain'; it has none"):
        check_options("m", {}, {"plain": 1})
    with pytest.raises(InputError, match="option 'kind' is 'c' where 'a' or 'b' was expected"):
        check_options("m", options, {"kind": "c"})
    with pytest.raises(InputError, match="options is a list"):
        check_options("m", options, [1])
