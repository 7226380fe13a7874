"""Gradients kept as a slice of the positions, where the result takes no more of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brute
import pytest
import torch
import torch.nn.functional as F
from helpers.fisher import assert_equal
from helpers.strangers import Body, expected
from models import HISTORIES, shaken
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.fisher import forward_backward
from fisherkern.fisher.forward import fast_ops
from fisherkern.fisher.forward.fast_ops import apply
from fisherkern.fisher.forward.slices import Slice, slice_rule
from fisherkern.fisher.layers.activations import _Gelu
from fisherkern.fisher.layers.attention import _Attended


class Block(Body):
    """A last block at all positions, as many libraries write it."""

    def __init__(self, feed_forward: str, taken: str) -> None:
        super().__init__()
        self.feed_forward, self.taken = feed_forward, taken
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.inner = nn.Conv1d(6, 6, 1) if feed_forward == "convolution" else nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.states(ids)
        query = self.norms[0](x)
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        x = query + self.attention(query, x, x, attn_mask=causal, need_weights=False)[0]
        x = self.norms[2](self._fed(self.norms[1](x)))
        x *= (ids[:, -1:] >= 0)[:, :, None]
        h = {"last": x[:, -1], "fourth": x[:, -2, :], "mean": x.mean(1)}[self.taken]
        return h @ self.items.weight.T

    def _fed(self, x: Tensor) -> Tensor:
        if self.feed_forward == "convolution":
            y = self.inner(x.transpose(1, 2)).transpose(1, 2)
            y += x
            return y
        if self.feed_forward == "positions":
            return self.inner(x + self.position)
        if self.feed_forward == "hooked":
            x = self.inner(x).relu()
            if x.requires_grad:
                x.register_hook(lambda gradient: 2 * gradient)
            return x
        return x + F.gelu(self.inner(x))


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the positions of every op's gradient are noted."""
    noted: list[int] = []
    backward = forward_backward.ForwardBackward.backward

    def watched(self: Any, forward: Any, *arguments: Any) -> Any:
        for span, deltas in backward(self, forward, *arguments):
            noted.extend(delta[0, 0].numel() // 6 for delta in deltas if delta is not None)
            yield span, deltas

    monkeypatch.setattr(forward_backward.ForwardBackward, "backward", watched)
    return noted


# What of the block is kept as a slice: all, what is above the sum with positions, or nothing.
KINDS = [
    ("linear", "last", 6),
    ("linear", "fourth", 6),
    ("convolution", "last", 6),
    ("positions", "last", 2),
    ("linear", "mean", 0),
    ("hooked", "last", 0),
]


@pytest.mark.parametrize(("feed_forward", "taken", "kept"), KINDS)
@pytest.mark.parametrize("settings", [{"sampler": "exact"}, {"sampler": "exact", "chunk": 1}])
def test_last_blocks(
    feed_forward: str,
    taken: str,
    kept: int,
    settings: dict[str, Any],
    positions: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Linear layers as in fp32, in fp64.
    monkeypatch.setattr(fast_ops, "suits_linear", lambda *_: torch.is_grad_enabled())
    model = shaken(Block(feed_forward, taken))
    fisher = fk.diag_fisher(model, [HISTORIES], progress=False, check=False, **settings)
    assert_equal(fisher, expected(model), 1e-12)
    assert positions.count(1) % max(kept, 1) == 0 and bool(positions.count(1)) == bool(kept)
    assert positions.count(5)


class Changing(nn.Module):
    """A layer whose gradient is another, on longer histories, than its calls tell."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.items = nn.Embedding(12, 6)
        self.layer, self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 12)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.layer(self.items(ids).cumsum(1)))
        z, longer = self.inner(x), ids.shape[1] > 5
        if self.kind == "layer hooked" and longer and z.requires_grad:
            z.register_hook(lambda gradient: 2 * gradient)
        y = torch.tanh(z)
        if self.kind == "turned":
            turn = torch.polar(torch.ones(()), torch.tensor(float(longer))).to(torch.complex128)
            y = (y * turn * turn).to(y.dtype)
        elif self.kind != "layer hooked" and longer and y.grad_fn is not None:
            if self.kind == "hooked":
                y.register_hook(lambda gradient: 2 * gradient)
            else:
                y.grad_fn.register_hook(lambda gradients, _: (2 * gradients[0],))
        return self.out((x + y)[:, -1])


@pytest.mark.parametrize("kind", ["hooked", "layer hooked", "node hooked", "turned"])
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_later_batches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch passes for one whose gradients are slices; a later one does not."""
    monkeypatch.setattr(fast_ops, "suits_linear", lambda *_: torch.is_grad_enabled())
    model = shaken(Changing(kind))
    longer = torch.cat([HISTORIES, HISTORIES[:, 3:]], dim=1)
    found = fk.diag_fisher(model, [HISTORIES, longer], progress=False, sampler="exact")
    parts = [brute.all_gradients(model, ids) for ids in (HISTORIES, longer)]
    first, second = (brute.fisher(gradients, p) for p, gradients in parts)
    assert_equal(found, {name: (first[name] + second[name]) / 2 for name in first}, 1e-12)


class Summed(nn.Module):
    """Sums in which an input is broadcast, in place and to a view, or promoted."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.items = nn.Embedding(12, 6)
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 12)
        if kind == "gates":
            self.gate = nn.Linear(6, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.layer(self.items(ids).cumsum(1)))
        if self.kind == "promoted":
            wide = torch.ones(ids.shape[1], 1, dtype=torch.float64)
            return self.out((self.layer(x) + wide).to(x.dtype)[:, -1])
        y = self.layer(x).transpose(0, 1)
        if self.kind == "gates":
            y += torch.sigmoid(self.gate(x)).transpose(0, 1)
        else:
            y += torch.tanh(self.layer(x.mean(1)))
        return self.out(y[-1])


@pytest.mark.parametrize("kind", ["gates", "vectors", "promoted"])
def test_sums_of_other_shapes_or_types(kind: str) -> None:
    model = shaken(Summed(kind))
    p, gradients = brute.all_gradients(model, HISTORIES)
    found = fk.diag_fisher(model.float(), [HISTORIES], progress=False, sampler="exact")
    assert_equal(found, brute.fisher(gradients, p), 1e-4)


WEIGHT, VECTOR = torch.randn(6, 6).double(), torch.randn(6).double()
# Functions of (N, T, D) whose last node has a rule.
SERVED: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: apply(fast_ops._Linear, x, WEIGHT, VECTOR),
    "layer norm": lambda x: apply(fast_ops._LayerNorm, x, VECTOR, VECTOR, 1e-5),
    "gelu": lambda x: apply(_Gelu, x, "none"),
    "heads": lambda x: x.unflatten(2, (2, 3)),
    "transposed": lambda x: x.transpose(1, -1),
    "sum": lambda x: x + 3,
    "difference": lambda x: 3 - x,
    "product": lambda x: x * VECTOR,
    "square": lambda x: x * x,
    "quotient": lambda x: x / VECTOR,
    "negative": lambda x: -x,
    "relu": torch.relu,
    "leaky": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "filled": lambda x: x.masked_fill(x > 0, 2.0),
    "chosen": lambda x: torch.where(x > 0, x, 2.0),
    "clone": torch.clone,
    "single": lambda x: x.float(),
}


@pytest.mark.parametrize("name", SERVED)
def test_rules(name: str) -> None:
    """A rule gives what autograd gives of the slice among zeros."""
    x = torch.randn(3, 5, 6).double().requires_grad_()
    y = SERVED[name](x)
    part = Slice(2 if name == "transposed" else 1, 3, 2)
    delta = part.of(torch.randn(4, *y.shape).to(y), part.dim + 1)
    assert y.grad_fn is not None
    rule = slice_rule(y.grad_fn, part)
    assert rule is not None
    pairs = zip(rule.function(delta), rule.slices, strict=True)
    found = sum(own.whole(g, x.shape) for g, own in pairs if g is not None and own is not None)
    for one, probe in zip(found, part.whole(delta, y.shape), strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(y, x, probe, retain_graph=True)[0])


def test_rule_of_attention() -> None:
    q, k, v = (torch.randn(3, 5, 2, 4).double().requires_grad_() for _ in range(3))
    y = apply(_Attended, q, k, v, None, 0.5)
    part = Slice(1, 2, 1)
    delta = part.of(torch.randn(4, *y.shape).double(), 2)
    rule = slice_rule(y.grad_fn, part)
    assert rule is not None and rule.slices[0] == part
    for index, x in enumerate((q, k, v)):
        own, found = rule.slices[index], rule.function(delta)[index]
        assert own is not None and found is not None
        for one, probe in zip(own.whole(found, x.shape), part.whole(delta, y.shape), strict=True):
            torch.testing.assert_close(one, torch.autograd.grad(y, x, probe, retain_graph=True)[0])


@pytest.mark.parametrize(
    "taken", [(slice(None), -2), (slice(None), slice(-2, None)), (slice(None), slice(1, 3))]
)
def test_selections(taken: Any) -> None:
    x = torch.randn(3, 5, 6).double().requires_grad_()
    y = x[taken]
    assert y.grad_fn is not None
    rule = slice_rule(y.grad_fn, None)
    assert rule is not None and rule.slices[0] is not None
    delta = torch.randn(4, *y.shape).double()
    found = rule.slices[0].whole(rule.function(delta)[0], x.shape)
    for one, probe in zip(found, delta, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(y, x, probe, retain_graph=True)[0])


# Last nodes without a rule: what mixes positions, reads every second, or scales in place.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "cumsum": lambda x: x.cumsum(1),
    "flattened": lambda x: x.flatten(0, 1),
    "softmax": lambda x: x.softmax(1),
    "second": lambda x: x[:, ::2],
    "transposed norm": lambda x: apply(fast_ops._LayerNorm, x, None, None, 1e-5),
    "in place": lambda x: x.clone().transpose(1, 2).mul_(2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_nodes_have_no_rule(name: str) -> None:
    x = torch.randn(3, 5, 6).double().requires_grad_()
    y = OTHERS[name](x)
    node = y.grad_fn
    if name == "in place":
        node = node.next_functions[0][0]
    part = Slice({"flattened": 0, "transposed norm": 2}.get(name, 1), 1, 1)
    rule = slice_rule(node, None if name == "second" else part)
    assert rule is None or rule.slices[0] is None
