"""Members that compute other functions of the same tensors are refused, wherever they differ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import NUM_ITEMS
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fisherkern as fk
from fisherkern.errors import InputError

WIDTH = 6


class Scores(nn.Module):
    """A model of somebody's own; what shapes no tensor is an attribute, or a module."""

    def __init__(self, seed: int, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.items = nn.Embedding(NUM_ITEMS + 1, WIDTH)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.heads, self.temperature, self.activation = 2, 1.0, F.relu
        self.gain: Any = None
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, history: Tensor) -> Tensor:
        h = self.activation(self.dense(self.items(history)[:, -1])) / self.temperature
        h = h + h.view(len(h), self.heads, -1).softmax(-1).flatten(1)
        h = h if self.gain is None else h * self.gain
        return h @ self.items.weight[1:].T


class Masked(Scores):
    """With a buffer that is not saved."""

    def __init__(self, seed: int, kept: int) -> None:
        super().__init__(seed)
        del self.gain
        self.register_buffer("gain", (torch.arange(WIDTH) < kept).float(), persistent=False)


def hooked(model: nn.Module) -> nn.Module:
    model.dense.register_forward_hook(lambda module, given, output: output * 2)
    return model


def patched(model: Any) -> nn.Module:
    forward = model.forward
    model.forward = lambda history: forward(history) * 2
    return model


OTHER_FUNCTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "number": (lambda: Scores(0), lambda: Scores(1, temperature=2.0), "logits"),
    "heads": (lambda: Scores(0), lambda: Scores(1, heads=3), "logits"),
    "function": (lambda: Scores(0), lambda: Scores(1, activation=F.gelu), "logits"),
    "tensor": (
        lambda: Scores(0, gain=torch.ones(WIDTH)),
        lambda: Scores(1, gain=torch.zeros(WIDTH)),
        "logits",
    ),
    "buffer": (lambda: Masked(0, 6), lambda: Masked(1, 3), "logits"),
    "hook": (lambda: Scores(0), lambda: hooked(Scores(1)), "logits"),
    "patch": (lambda: Scores(0), lambda: patched(Scores(1)), "logits"),
    "compiled": (
        lambda: torch.compile(Masked(0, 6)),
        lambda: torch.compile(Masked(1, 3)),
        "logits",
    ),
    "module": (
        lambda: Scores(0, activation=nn.ReLU()),
        lambda: Scores(1, activation=nn.GELU()),
        "module 'activation' is a GELU in member 1",
    ),
    "setting": (
        lambda: Scores(0, activation=nn.GELU()),
        lambda: Scores(1, activation=nn.GELU("tanh")),
        "module 'activation' has approximate='tanh' in member 1",
    ),
    "epsilon": (
        lambda: Scores(0, activation=nn.LayerNorm(WIDTH)),
        lambda: Scores(1, activation=nn.LayerNorm(WIDTH, eps=1e-12)),
        "module 'activation' has eps=1e-12 in member 1",
    ),
}


@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
def test_other_functions_are_refused(name: str) -> None:
    first, other, message = OTHER_FUNCTIONS[name]
    members = [first().eval(), other().eval()]
    with pytest.raises(InputError, match=message):
        fk.merge(members)


def weight_normed(seed: int) -> Scores:
    model = Scores(seed)
    parametrizations.weight_norm(model.dense)
    return model


SAME_FUNCTION: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "attributes": (Scores, lambda seed: Scores(seed, note="another", epoch=7)),
    "dropout": (
        lambda seed: Scores(seed, activation=nn.Dropout(0.1)),
        lambda seed: Scores(seed, activation=nn.Identity()),
    ),
    "lambdas": (
        lambda seed: Scores(seed, activation=lambda x: x),
        lambda seed: Scores(seed, activation=lambda x: x),
    ),
    "buffer": (lambda seed: Masked(seed, 6), lambda seed: Masked(seed, 6)),
    "wrapped": (lambda seed: torch.compile(Scores(seed)), Scores),
}


@pytest.mark.parametrize("name", SAME_FUNCTION)
def test_one_function_is_merged(name: str) -> None:
    first, other = (make(seed) for seed, make in enumerate(SAME_FUNCTION[name]))
    before = copy.deepcopy([dict(first.named_parameters()), dict(other.named_parameters())])
    merged = fk.merge([first, other]).parameters()
    for value, a, b in zip(merged, before[0].values(), before[1].values(), strict=True):
        torch.testing.assert_close(value, (a + b) / 2)
    for model, own in zip((first, other), before, strict=True):
        assert all(torch.equal(p, own[key]) for key, p in model.named_parameters())
        assert model.training


def pruned(seed: int) -> Scores:
    model = Scores(seed)
    with torch.no_grad():
        prune.l1_unstructured(model.dense, "weight", 0.5)
        model(torch.arange(1, 5)[None])
    return model


def reflected(seed: int) -> Scores:
    model = Scores(seed)
    model.dense.register_parameter("hra_u", nn.Parameter(torch.randn(WIDTH, 2)))
    return model


@pytest.mark.parametrize("make", [weight_normed, pruned, reflected])
def test_factors_of_weights_are_refused(make: Callable[[int], nn.Module]) -> None:
    with pytest.raises(InputError, match="is a factor of a weight"):
        fk.merge([make(0), make(1)])


class Keeps(Scores):
    """It keeps in evaluation mode what it computed of its tensors."""

    def forward(self, history: Tensor) -> Tensor:
        if self.training or self.gain is None:
            self.gain = self.items.weight.std(dim=0)
        return super().forward(history)


def test_nothing_that_a_member_keeps_goes_into_the_merge() -> None:
    members = [Keeps(seed).eval() for seed in (0, 1)]
    history = torch.arange(1, 5)[None]
    merged = fk.merge(members)
    assert members[0].gain is members[1].gain is None
    assert torch.equal(merged(history), merged.train()(history))


class Holder:
    """A library's own object around a module, which copies it in a way of its own."""

    def __init__(self, torch_model: nn.Module) -> None:
        self.torch_model = torch_model

    def __deepcopy__(self, memo: dict[int, Any]) -> Holder:
        return Holder(copy.deepcopy(self.torch_model))


def test_a_holder_that_copies_by_itself() -> None:
    merged = fk.merge([Holder(Scores(0)), Holder(Scores(1))])
    expected = fk.merge([Scores(0), Scores(1)])
    for one, other in zip(merged.torch_model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(InputError, match="computes another function"):
        fk.merge([Holder(Scores(0)), Holder(Scores(1, heads=3))])
