"""Parts of a data set: nothing held out is in them, and items keep their rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fisherkern as fk
from benchmarks.experiments.data_parts import item_count_weights, training_subset, with_catalogue


def literal(data: fk.SequenceDataset) -> dict[str, list[str]]:
    return {
        user: [data.item_ids[v - 1] for v in data.sequence(u)]
        for u, user in enumerate(data.user_ids)
    }


@pytest.fixture
def letters() -> fk.SequenceDataset:
    """Users p: a b c a d e; q: b c; r: d d a b. The last two of each are held out."""
    items = [1, 2, 3, 1, 4, 5, 2, 3, 4, 4, 1, 2]
    return fk.SequenceDataset("letters", items, [0, 6, 8, 12], list("abcde"), list("pqr"))


def test_training_part_holds_nothing_that_is_held_out(letters: fk.SequenceDataset) -> None:
    every = np.ones(12, bool)
    assert literal(training_subset(letters, every)) == {
        "p": ["a", "b", "c", "a", "a", "a"],
        "r": ["d", "d", "a", "a"],
    }
    # Another catalogue; r has one action left, which is no training pair.
    keep = np.array([1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1], bool)
    part = training_subset(letters, keep, list("dca"))
    assert literal(part) == {"p": ["a", "c", "a", "d", "d"]} and part.num_items == 3
    assert part.popularity().tolist() == [0, 1, 2]


def test_over_items_keeps_rows_by_their_item() -> None:
    base, own = (fk.BERT4Rec(n, max_len=4, dim=2, heads=1).eval() for n in (5, 2))
    base.item_ids, own.item_ids = list("abcde"), list("da")
    assert own.output_bias is not None and base.output_bias is not None
    for bias in (own.output_bias, base.output_bias):
        bias.data = torch.rand_like(bias)
    model = with_catalogue(own, list("edcab"), base)
    history = torch.tensor([[0, 2, 4, 4], [4, 2, 2, 4]])  # d a a of the one, 1 2 2 of the other
    narrow = torch.tensor([[0, 1, 2, 2], [2, 1, 1, 2]])
    torch.testing.assert_close(model(history)[:, [1, 3]], own(narrow))
    table, bias = model.item_embedding.weight, model.output_bias
    for place, item in ((1, 5), (3, 3), (5, 2)):
        assert torch.equal(table[place], base.item_embedding.weight[item])
        assert bias is not None and bias[place - 1] == base.output_bias[item - 1]


def test_count_weights_by_hand(letters: fk.SequenceDataset) -> None:
    part = training_subset(letters, np.isin(np.arange(12), [0, 3, 9]), list("da"))
    model = fk.BERT4Rec(2, max_len=4, dim=2, heads=1)
    weights = item_count_weights(model, part, 5)
    assert weights.keys() == dict(model.named_parameters()).keys()
    mean = pytest.approx(2 / 5)
    assert weights["item_embedding.weight"].tolist() == [[mean] * 2, [0, 0], [2, 2], [mean] * 2]
    assert weights["output_bias"].tolist() == [0, 2]
    assert weights["position_embedding.weight"].tolist() == [[mean] * 2] * 4
