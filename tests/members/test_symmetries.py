"""An encoder's symmetries: its own, and inherited only by what computes the same."""

import pytest
from torch import nn

from fisherkern.encoders import SASRec
from fisherkern.errors import InputError
from fisherkern.members.symmetries import symmetries_of


class Renamed(SASRec):
    """Another name for the same function."""


class Squared(SASRec):
    """Another function with the same parameters."""

    def states(self, tokens, positions=None):
        return super().states(tokens, positions).square()


class Described(Squared):
    """Says what it admits."""

    def symmetries(self):
        return super().symmetries()


def test_a_subclass_that_computes_the_same_inherits():
    expected = symmetries_of(SASRec(5, dim=4))
    assert symmetries_of(Renamed(5, dim=4)) == expected
    assert symmetries_of(Described(5, dim=4)) == expected


def test_a_subclass_that_computes_something_else_must_say_so():
    with pytest.raises(InputError, match=r"Squared defines states\(\) but no symmetries\(\)"):
        symmetries_of(Squared(5, dim=4))


def test_a_model_without_the_method():
    with pytest.raises(InputError, match="no symmetries are known for Linear"):
        symmetries_of(nn.Linear(2, 2))
