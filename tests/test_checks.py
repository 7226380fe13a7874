"""The validators of all rooms: what they take, and the sentence for what they do not."""

import math

import numpy as np
import pytest

from fisherkern import checks
from fisherkern.errors import InputError


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (checks.check_count, (1,)),
        (checks.check_count, (np.int32(7), 7)),
        (checks.check_count, (0, 0)),
        (checks.check_choice, ("b", ("a", "b"))),
        (checks.check_choice, ("b", {"a": 1, "b": 2})),
        (checks.check_positive, (1e-30,)),
        (checks.check_positive, (np.float32(2),)),
        (checks.check_not_negative, (0,)),
        (checks.check_unit, (0,)),
        (checks.check_unit, (np.float64(1.0),)),
        (checks.check_unit, (0.0, "[0, 1)")),
        (checks.check_unit, (1.0, "(0, 1]")),
    ],
)
def test_what_is_right_passes(check, arguments):
    check("x", *arguments)


@pytest.mark.parametrize(
    ("check", "arguments", "said"),
    [
        (checks.check_count, (0,), "x must be at least 1, got 0"),
        (checks.check_count, (np.int64(2), 3), "x must be at least 3, got 2"),
        (checks.check_count, (-1, 0), "x must not be negative, got -1"),
        (checks.check_count, (2.0,), "x must be an integer, got 2.0"),
        (checks.check_count, (True,), "x must be an integer, got True"),
        (checks.check_count, ("3",), "x must be an integer, got '3'"),
        (checks.check_choice, ("c", ("a", "b")), "x must be 'a' or 'b', got 'c'"),
        (checks.check_choice, (["a"], {"a": 1}), "x must be 'a', got ['a']"),
        (checks.check_positive, (0,), "x must be positive and finite, got 0"),
        (checks.check_positive, (math.inf,), "x must be positive and finite, got inf"),
        (checks.check_positive, (math.nan,), "x must be positive and finite, got nan"),
        (checks.check_positive, ("1",), "x must be positive and finite, got '1'"),
        (checks.check_not_negative, (-0.5,), "x must be 0 or more and finite, got -0.5"),
        (checks.check_not_negative, (None,), "x must be 0 or more and finite, got None"),
        (checks.check_unit, (1.5,), "x must be in [0, 1], got 1.5"),
        (checks.check_unit, (1, "[0, 1)"), "x must be in [0, 1), got 1"),
        (checks.check_unit, (0, "(0, 1]"), "x must be in (0, 1], got 0"),
        (checks.check_unit, (math.nan, "(0, 1]"), "x must be in (0, 1], got nan"),
    ],
)
def test_what_is_wrong_is_named(check, arguments, said):
    with pytest.raises(InputError) as caught:
        check("x", *arguments)
    assert str(caught.value) == said
