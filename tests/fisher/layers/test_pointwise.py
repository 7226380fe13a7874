"""Convolutions with a kernel of one, as SASRec's feed-forward layers are in many libraries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fisher import assert_equal
from helpers.strangers import Body, expected
from models import HISTORIES, shaken
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.fisher.forward import fast_ops


class Pointwise(Body):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Conv1d(6, 8, 1, bias=bias)
        self.second = nn.Conv1d(8, 6, kernel_size=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.states(ids)
        inner = self.first(x.transpose(1, 2))
        inner += 0.5
        x = x + self.second(F.leaky_relu_(inner)).transpose(1, 2)
        return x[:, -1] @ self.items.weight.T


@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_convolutions(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(Pointwise(bias))
    wanted = expected(model)
    double = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    assert_equal(double, wanted)
    calls = []
    forward = fast_ops._Pointwise.forward
    monkeypatch.setattr(
        fast_ops._Pointwise, "forward", lambda ctx, *args: calls.append(1) or forward(ctx, *args)
    )
    single = copy.deepcopy(model).float()
    fisher = fk.diag_fisher(single, [HISTORIES], sampler="exact", progress=False)
    assert_equal(fisher, {name: value.float() for name, value in wanted.items()}, 1e-4)
    assert calls


@pytest.mark.parametrize(
    "settings", [{"stride": 2}, {"padding": 1}, {"groups": 2}, {"padding": "same"}, {}]
)
def test_other_convolutions_are_left_as_they_are(settings: dict[str, Any]) -> None:
    x = torch.randn(2, 4, 5)
    weight = torch.randn(6, 4 // settings.get("groups", 1), 1)
    found = fast_ops.pointwise_convolution(x, weight, None, **settings)
    torch.testing.assert_close(found, F.conv1d(x, weight, None, **settings))
