"""Models and functions as strangers write them, ranked as a loop of floats ranks them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fisherkern as fk

DATA = fk.synthetic(num_users=40, num_items=30, seed=1)
ITEMS = DATA.num_items

Batch = dict[str, Tensor]


class Dropping(nn.Module):
    """Dropout shows at once whether it is in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(ITEMS + 1, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, batch: Batch) -> Tensor:
        states = torch.tanh(self.drop(self.items(batch["history"])).cumsum(1)[:, -1])
        return states @ self.items.weight.T

    def predict(self, batch: Batch) -> Tensor:
        return self(batch)


def ranks_of(score: Callable[[Batch], Tensor]) -> list[int]:
    """Ranks among the items that a user has not had, by a loop."""
    ranks = []
    for batch in DATA.loader(split="test", batch_size=1):
        target, had = int(batch["target"]), set(DATA.sequence(int(batch["user"]))[:-1].tolist())
        z = score(batch)[0].tolist()
        others = [v for v in range(1, ITEMS + 1) if v != target and v not in had]
        ranks.append(1 + sum(z[v] >= z[target] for v in others))
    return ranks


class Writing(nn.Module):
    """Counts items from 0, or marks them, in the batch that it was given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.model = name, Dropping()

    def forward(self, batch: Batch) -> Tensor:
        z = self.model(batch)
        batch[self.name] -= 1
        return z


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("name", ["history", "target", "user"])
def test_a_model_may_write_to_its_batch(name: str, function: bool, caplog: Any) -> None:
    model = Writing(name)
    given = model.forward if function else model
    report = fk.evaluate(given, DATA, batch_size=7)
    assert report.ranks.tolist() == ranks_of(Dropping().eval())
    assert not caplog.records


class Holder:
    """No module, and has one in a list."""

    def __init__(self, model: nn.Module) -> None:
        self.models = [model]

    def score(self, batch: Batch) -> Tensor:
        return self.models[0](batch)

    def __call__(self, batch: Batch) -> Tensor:
        return self.score(batch)


GLOBAL = Dropping()


def by_global(batch: Batch) -> Tensor:
    return GLOBAL(batch)


def by_helper(batch: Batch) -> Tensor:
    return by_global(batch)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model.predict,
        lambda model: lambda batch: model(batch),
        lambda model: functools.partial(model),
        lambda model: functools.partial(lambda own, batch: own(batch), model),
        Holder,
        lambda model: Holder(model).score,
        lambda model: fk.adapt(model).logits,
        lambda model: by_global,
        lambda model: by_helper,
    ],
)
def test_modules_of_a_function_run_in_eval_mode(wrap: Callable[[Any], Any], caplog: Any) -> None:
    model = Dropping()
    model.drop.train()
    model.items.eval()
    GLOBAL.train()
    report = fk.evaluate(wrap(model), DATA)
    assert report.ranks.tolist() == ranks_of(Dropping().eval())
    assert model.drop.training and not model.items.training and GLOBAL.training
    assert not caplog.records


def test_a_function_that_draws_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = Dropping().eval()
    fk.evaluate(lambda batch: model(batch) + torch.rand(ITEMS + 1), DATA)
    assert ["the ranks are of this run alone" in r.getMessage() for r in caplog.records] == [True]


@pytest.mark.parametrize("data", [[torch.ones(2, 3, dtype=torch.int64)], np.ones((2, 3)), None])
def test_data_that_are_no_data_set_are_refused(data: Any) -> None:
    with pytest.raises(fk.InputError, match=r"data: expected what fk.load or fk.from_frame gives"):
        fk.evaluate(Dropping(), data)


@pytest.mark.parametrize("offset", [0, 2**30, -(2**40)])
def test_large_counts_keep_their_order(offset: int) -> None:
    """In fp32 those beyond 2^24 tie."""
    model = Dropping().eval()

    def counts(batch: Batch) -> Tensor:
        return (10 * model(batch)).long() + offset

    assert fk.evaluate(counts, DATA).ranks.tolist() == ranks_of(counts)
