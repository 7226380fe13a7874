"""Rows that are as many as sequences by chance: their number comes of values."""

from __future__ import annotations

from collections.abc import Callable

import brute
import pytest
import torch
from helpers.fisher import assert_equal
from torch import Tensor, nn

import fisherkern as fk

ITEMS = 11


def by_mask(ids: Tensor) -> Tensor:
    return ids[ids != 0]


def selected(ids: Tensor) -> Tensor:
    return ids.masked_select(ids != 0)


def by_places(ids: Tensor) -> Tensor:
    return ids[torch.where(ids != 0)]


def by_nonzero(ids: Tensor) -> Tensor:
    return ids.flatten()[(ids != 0).flatten().nonzero()[:, 0]]


def cut_by_lengths(ids: Tensor) -> Tensor:
    lengths = (ids != 0).sum(dim=1).tolist()
    return torch.cat([row[len(row) - n :] for row, n in zip(ids, lengths, strict=True)])


class Flat(nn.Module):
    """Looks up the real items alone, in one row."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.choose = choose
        self.embedding = nn.Embedding(1 + ITEMS, 5)
        self.mix = nn.Linear(5, 5)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.mix(self.embedding(self.choose(ids)))
        ends = (ids != 0).sum(dim=1).cumsum(dim=0)
        owner = torch.searchsorted(ends, torch.arange(len(rows)), right=True)
        states = rows.new_zeros(len(ids), 5).index_add(0, owner, rows).tanh()
        return states @ self.embedding.weight[1:].t()


@pytest.mark.parametrize("choose", [by_mask, selected, by_places, by_nonzero, cut_by_lengths])
def test_rows_are_told_apart_in_every_batch(choose: Callable[[Tensor], Tensor]) -> None:
    """The first batch has an item for each sequence, the second as many items in other places."""
    torch.manual_seed(0)
    model = Flat(choose).double().eval()
    batches = [
        torch.tensor([[0, 0, 7], [0, 0, 9], [0, 0, 3], [0, 0, 5]]),
        torch.tensor([[0, 0, 2], [0, 8, 7], [0, 0, 0], [0, 0, 3]]),
    ]
    weights = dict(model.named_parameters())
    expected = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for ids in batches:
        log_p = model(ids).log_softmax(dim=1)
        for entry in log_p.flatten():
            gradients = torch.autograd.grad(entry, list(weights.values()), retain_graph=True)
            for name, gradient in zip(weights, gradients, strict=True):
                expected[name] += entry.exp().detach() * gradient.square() / 8
    found = fk.diag_fisher(model, batches, sampler="exact", progress=False)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


class Ordered(nn.Module):
    """Works on the sequences in the order of their lengths, and puts them back."""

    def __init__(self, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.order = order
        self.embedding = nn.Embedding(1 + ITEMS, 5)
        self.mix = nn.Linear(5, 5)

    def forward(self, ids: Tensor) -> Tensor:
        order = self.order((ids != 0).sum(dim=1))
        states = self.mix(self.embedding(ids[order])).mean(dim=1).tanh()
        return states[order.argsort()] @ self.embedding.weight[1:].t()


@pytest.mark.parametrize(
    "order",
    [
        lambda lengths: lengths.argsort(),
        lambda lengths: torch.sort(lengths, descending=True).indices,
        lambda lengths: lengths.topk(len(lengths)).indices,
    ],
)
def test_sequences_in_an_order_of_their_values(order: Callable[[Tensor], Tensor]) -> None:
    """The first two are in that order, the others are not."""
    torch.manual_seed(0)
    model = Ordered(order).double().eval()
    batch = torch.tensor([[0, 0, 2], [0, 8, 7], [3, 1, 4], [0, 0, 3], [5, 8, 1]])
    found = fk.diag_fisher(model, [batch], sampler="exact", progress=False)
    p, gradients = brute.all_gradients(model, batch)
    assert_equal(found, brute.fisher(gradients, p))
