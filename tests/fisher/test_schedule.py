"""Parts of alike lengths: every sequence once, the same Fisher, fewer positions computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.fisher.schedule import Schedule


def histories(n: int, width: int, short: float) -> Tensor:
    """Random ids of 1..30, a share `short` of the rows with two of them, some with none."""
    g = torch.Generator().manual_seed(n)
    history = torch.randint(1, 31, (n, width), generator=g)
    history[torch.rand(n, generator=g) < short, :-2] = 0
    history[::17] = 0
    return history


def buckets(model: Any, batch: Any, n: int, most: int) -> list[tuple[Any, Tensor]]:
    schedule = Schedule.of_one_probe(most)
    return list(schedule.length_buckets(ModelAdapter.of(model), batch, n))


def model(width: int = 16) -> fk.BERT4Rec:
    torch.manual_seed(0)
    return fk.BERT4Rec(30, max_len=width, dim=8, layers=2, heads=2).double().eval()


@pytest.mark.parametrize("kind", ["tensor", "mapping", "pair"])
@pytest.mark.parametrize("size", [7, 64, 1000])
def test_every_sequence_is_in_one_part(kind: str, size: int) -> None:
    history, target = histories(600, 16, 0.5), torch.arange(600)
    batch: Any = {
        "tensor": history,
        "mapping": {"history": history, "target": target, "name": "x"},
        "pair": (history, target),
    }[kind]
    numbers = []
    for part, which in buckets(model(), batch, 600, size):
        assert 1 <= len(which) <= size
        rows = {"tensor": lambda p: p, "mapping": lambda p: p["history"], "pair": lambda p: p[0]}
        assert torch.equal(rows[kind](part), history[which])
        if kind != "tensor":
            assert torch.equal(part["target"] if kind == "mapping" else part[1], which)
        numbers += which.tolist()
    assert sorted(numbers) == list(range(600)) != numbers


def test_short_histories_are_not_computed_at_full_length() -> None:
    history = histories(600, 16, 0.6)
    m, cells = model(), []
    m.position_embedding.register_forward_hook(lambda _, i, __: cells.append(i[0].numel()))
    for part, _ in buckets(m, history, 600, 600):
        m.encode(part)
    assert sum(cells) < 0.6 * history.numel()


@pytest.mark.parametrize("sampler", ["exact", "model", "topk"])
def test_the_fisher_is_that_of_single_sequences(sampler: str) -> None:
    history = histories(160, 16, 0.6)
    together = fk.diag_fisher(model(), [history], sampler=sampler, k=3, progress=False)
    alone = fk.diag_fisher(model(), [history], sampler=sampler, k=3, chunk=1, progress=False)
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-9, atol=1e-14)


def test_other_models_and_batches_keep_their_order() -> None:
    class Other(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return batch.float()

    history = histories(600, 16, 0.5)
    found = buckets(Other(), history, 600, 64)
    assert torch.equal(torch.cat([which for _, which in found]), torch.arange(600))
    assert torch.equal(torch.cat([part for part, _ in found]), history)
    assert {len(which) for _, which in found} == {60}
    rows = history.numpy()
    lengths = [(len(part), len(which)) for part, which in buckets(model(), rows, 600, 250)]
    assert lengths == [(200, 200)] * 3
    assert buckets(Other(), history[:0], 0, 64) == []
    ((whole, _),) = buckets(model(), rows, 600, 600)
    assert whole is rows
