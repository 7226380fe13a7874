"""Calls that look like a use of a parameter and are none, or are another one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import Recommender, assert_right
from models import HISTORIES, NUM_ITEMS, Foreign, bert
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.errors import InputError


class Target(nn.Module):
    """A frozen copy of a layer, read off the layer itself: no gradient passes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        x = x.mean(1)
        with torch.no_grad():
            frozen = {
                "detach": self.mix.weight.detach(),
                "detached rows": self.mix.weight.detach()[:],
                "rows without grad": self.mix.weight[:],
            }[self.how]
        return torch.tanh(self.mix(x)) + F.linear(x, frozen) + x @ frozen


@pytest.mark.parametrize("how", ["detach", "detached rows", "rows without grad"])
def test_a_view_without_gradient_is_no_use(how: str, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(Target(how)), caplog)


class PaddedPositions(nn.Module):
    """Positions looked up once for all sequences, one of them trained by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(5, 4))

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1])
        return torch.tanh(x + F.embedding(ids, self.positions, padding_idx=0)).sum(1)


def test_shared_positions_with_a_padding_row(caplog: pytest.LogCaptureFixture) -> None:
    model = Recommender(PaddedPositions())
    assert_right(model, caplog, history=HISTORIES[:4])


class OneHot(nn.Module):
    """A bag of items, by a function without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUM_ITEMS + 1, NUM_ITEMS + 1))

    def forward(self, history: Tensor) -> Tensor:
        ones = F.one_hot(history, NUM_ITEMS + 1).to(self.weight.dtype)
        return torch.tensordot(ones.sum(1), self.weight, dims=1)


def test_a_model_without_any_known_call(caplog: pytest.LogCaptureFixture) -> None:
    assert_right(OneHot(), caplog, fallback=["weight"])


@pytest.mark.parametrize("make", [bert, lambda: Foreign("none").double()])
@pytest.mark.parametrize(
    "settings",
    [{"sampler": "exact"}, {"k": 11}, {"sampler": "model"}, {"k": 3, "reduction": "batchwise"}],
)
def test_a_model_that_gives_nan_is_named(make, settings: dict[str, object]) -> None:
    model = make()
    with torch.no_grad():
        next(p for p in model.parameters() if len(p) > NUM_ITEMS)[5] = torch.nan
    with pytest.raises(InputError, match="the logits of sequence number [02] hold a NaN"):
        fk.diag_fisher(model, [HISTORIES], progress=False, **settings)
