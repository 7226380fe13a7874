"""The engine's F.linear in fp32 against PyTorch's in float64, and where it stands aside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.layouts import layouts
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.adapters.parameters import Parameters
from fisherkern.fisher.forward.capture import Capture
from fisherkern.fisher.forward.fast_ops import linear
from fisherkern.fisher.layers import HANDLERS
from fisherkern.ops import products


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a product is."""
    monkeypatch.setattr(products, "_LEAST", 0)
    monkeypatch.setattr(products, "_WIDE", 0)


def used(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_LinearBackward"


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 11, 16), (2, 3, 5, 7), (0, 4, 6)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_output_and_input_gradient(shape: tuple[int, ...], biased: bool) -> None:
    weight = nn.Parameter(torch.randn(13, shape[-1]))
    bias = nn.Parameter(torch.randn(13)) if biased else None
    for x, delta in zip(layouts(shape), layouts((*shape[:-1], 13)), strict=True):
        x.requires_grad_()
        found = linear(x, weight, bias)
        assert used(found) == (0 not in shape)
        wide = x.detach().double().requires_grad_()
        exact = F.linear(wide, weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(found, exact.float())
        (gradient,) = torch.autograd.grad(found, x, delta)
        (expected,) = torch.autograd.grad(exact, wide, delta.double())
        torch.testing.assert_close(gradient, expected.float())


def test_a_computed_weight_gets_its_gradient() -> None:
    layer = nn.Linear(4, 3, bias=False)
    with Capture(Parameters(layer), 2, HANDLERS):
        assert used(F.linear(torch.randn(2, 4), layer.weight))
        output = F.linear(torch.randn(2, 4), layer.weight.exp())
    assert not used(output)
    output.sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_pytorch(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(3, 4, dtype=dtype))
    assert not used(linear(torch.randn(2, 4, dtype=dtype), weight))


def test_autocast_is_left_to_pytorch() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(2, 4), weight).dtype == torch.bfloat16


def test_the_output_may_be_overwritten() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 6)
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 7)

        def forward(self, batch: Tensor) -> Tensor:
            return self.second(F.relu(self.first(self.table(batch)), inplace=True).mean(dim=1))

    torch.manual_seed(0)
    model = Overwriting()
    batches = [torch.randint(0, 7, (4, 3))]
    narrow = fk.diag_fisher(model, batches, sampler="topk", k=7, progress=False)
    wide = fk.diag_fisher(model.double(), batches, sampler="topk", k=7, progress=False)
    for name in wide:
        torch.testing.assert_close(narrow[name], wide[name].float(), rtol=1e-4, atol=1e-7)
