"""Layers, and the entropy of their weights, by hand."""

import math

import pytest
import torch

from fisherkern.members.layers import entropy, histogram, over_layers


def test_vectors_belong_to_the_matrix_before_them():
    names = ["scale", "a.weight", "a.bias", "norm", "b.weight", "b.bias"]
    values = over_layers(names, {"a.weight": 1, "b.weight": 2}, 0)
    assert values == dict(zip(names, [1, 1, 1, 1, 2, 2], strict=True))
    assert over_layers(names[:1], {}, 7) == {"scale": 7}


def test_the_last_bin_holds_the_largest_value():
    values = torch.tensor([0.0, 0.9, 1.0, 3.9, 4.0]).double()
    assert histogram(values, values.min(), values.max(), 4).tolist() == [2, 1, 0, 2]
    equal = torch.full((3,), 2.0).double()
    assert histogram(equal, equal.min(), equal.max(), 2).tolist() == [3, 0]


def test_entropy_in_nats():
    counts = torch.tensor([[2, 2, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert entropy(counts).tolist() == [
        pytest.approx(math.log(2)), 0.0, pytest.approx(math.log(4)),
    ]  # fmt: skip
