"""Several gradients at once: right where PyTorch's rules for vmap are, alone where they are not."""

from __future__ import annotations

import brute
import pytest
import torch
from helpers.fisher import assert_equal
from helpers.layers import Recommender
from models import HISTORIES, NUM_ITEMS
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.fisher.forward.vjp import vector_jacobians


class Distances(Recommender):
    """Scores by distance, whose backward pass torch.vmap gets wrong in PyTorch 2.13."""

    def forward(self, history: Tensor) -> Tensor:
        return -torch.cdist(self.items(history)[:, -1] + 0.1, self.items.weight)


class Distant(nn.Module):
    """The same function below a layer, whose gradients go through it together."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors = nn.Parameter(torch.randn(3, 4))
        self.dense = nn.Linear(4, 4)
        self.out = nn.Linear(3, 4)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        return self.out(torch.cdist(self.dense(x).mean(1), self.anchors))


class Shifted(nn.Module):
    """A parameter that only the distances depend on, computed the same for every sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors = nn.Parameter(torch.randn(3, 4))
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        between = torch.cdist(self.anchors, self.anchors.flip(0) + 1)
        return self.out(x.mean(1)) + between.mean(0).sum() * x.mean(1)


@pytest.mark.parametrize("sampler", ["exact", "topk"])
@pytest.mark.parametrize("body", [None, Distant, Shifted])
def test_a_function_that_vmap_gets_wrong(body: type[nn.Module] | None, sampler: str) -> None:
    torch.manual_seed(0)
    model = Distances(nn.Identity()) if body is None else Recommender(body())
    if body is None:
        del model.decoder
    model = model.double().eval()
    p, gradients = brute.all_gradients(model, HISTORIES)
    fisher = fk.diag_fisher(
        model, [HISTORIES], sampler=sampler, k=NUM_ITEMS + 1, check=False, progress=False
    )
    assert_equal(fisher, brute.fisher(gradients, p))


def test_a_wrong_rule_is_not_used() -> None:
    """Whichever functions PyTorch gets wrong: here one of our own with a wrong rule."""

    class Doubled(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: object, inputs: object, output: object) -> None:
            pass

        @staticmethod
        def backward(ctx: object, delta: Tensor) -> Tensor:
            # Of several at once, which a plain tensor is not, another number.
            return (3 if torch._C._functorch.is_batchedtensor(delta) else 2) * delta

    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    given = torch.randn(3, 4, dtype=torch.float64)
    (found,) = vector_jacobians([Doubled.apply(x)], [x], given)
    torch.testing.assert_close(found, 2 * given)


def test_parameters_without_entries() -> None:
    """As AdaptiveLogSoftmaxWithLoss has in a narrow model."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(NUM_ITEMS + 1, 4)
            self.adaptive = nn.AdaptiveLogSoftmaxWithLoss(4, NUM_ITEMS + 1, [3, 5])

        def forward(self, history: Tensor) -> Tensor:
            return self.adaptive.log_prob(self.items(history).mean(1))

    torch.manual_seed(0)
    model = Narrow().double().eval()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert any(0 in shape for shape in shapes.values())
    fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    assert {name: value.shape for name, value in fisher.items()} == shapes
    for name in [name for name, shape in shapes.items() if 0 in shape]:
        dict(model.named_parameters())[name].requires_grad_(False)
    p, gradients = brute.all_gradients(model, HISTORIES)
    assert_equal({name: fisher[name] for name in gradients}, brute.fisher(gradients, p))
