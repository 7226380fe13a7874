"""One model in training mode, worked on by several threads: each has its own right numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import HISTORIES, NUM_ITEMS, shaken
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.modes import eval_mode


class Dropping(nn.Module):
    """Dropout that shows at once whether the model is in training mode."""

    max_len = 5

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, 4)
        self.drop = nn.Dropout(0.5)
        self.layer = nn.GRU(4, 4, batch_first=True)
        self.out = nn.Linear(4, NUM_ITEMS + 1)

    def forward(self, history: Any) -> Tensor:
        history = history["history"] if isinstance(history, dict) else history
        return self.out(self.drop(self.layer(self.drop(self.items(history)))[0][:, -1]))


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """The results of jobs that run at once."""
    results: list[Any] = [None] * len(jobs)

    def work(number: int, job: Callable[[], Any]) -> None:
        try:
            results[number] = job()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def fisher(model: nn.Module, times: int) -> dict[str, Tensor]:
    batches = [HISTORIES] * times
    return dict(fk.diag_fisher(model, batches, sampler="exact", progress=False))


def report(model: nn.Module, batch_size: int) -> dict[str, float]:
    data = fk.synthetic(60, NUM_ITEMS, min_length=5, max_length=9, clusters=2, tastes=1)
    return dict(fk.evaluate(model, data, batch_size=batch_size))


@pytest.mark.parametrize("times", [(1, 12), (6, 6), (12, 1)])
def test_two_fishers_of_one_model(times: tuple[int, int]) -> None:
    """The one that ends first does not put the other's model into training mode."""
    model = shaken(Dropping()).train()
    expected = fisher(model, 1)
    for found in together(*[lambda n=n: fisher(model, n) for n in times]):
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-9)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("sizes", [(1, 30), (30, 1)])
def test_two_evaluations_of_one_model(sizes: tuple[int, int]) -> None:
    """Of one batch size or another."""
    model = shaken(Dropping()).train()
    expected = report(model, 60)
    assert together(*[lambda n=n: report(model, n) for n in sizes]) == [expected] * 2
    assert all(module.training for module in model.modules())


def test_an_evaluation_beside_a_fisher() -> None:
    """Both ways of working on a model, at once."""
    model = shaken(Dropping()).train()
    fishers, reports = fisher(model, 1), report(model, 1)
    found = together(lambda: fisher(model, 8), lambda: report(model, 1))
    assert found[1] == reports
    for name, value in found[0].items():
        torch.testing.assert_close(value, fishers[name], rtol=1e-4, atol=1e-9)
    assert all(module.training for module in model.modules())


def test_a_block_that_ends_first_leaves_the_other_in_eval_mode() -> None:
    """In whatever order they end, and modes of parts come back as well."""
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.GRU(2, 2), nn.Dropout()))
    model[1][1].eval()
    before = [module.training for module in model.modules()]
    cudnn = torch.backends.cudnn.enabled
    for first_out in (0, 1):
        blocks = [eval_mode(model, gradients=True), eval_mode(model[1], gradients=True)]
        for block in blocks:
            block.__enter__()
        blocks[first_out].__exit__(None, None, None)
        assert not any(module.training for module in model[1].modules())
        assert not torch.backends.cudnn.enabled
        blocks[1 - first_out].__exit__(None, None, None)
        assert [module.training for module in model.modules()] == before
        assert torch.backends.cudnn.enabled == cudnn
