"""F.scaled_dot_product_attention: results and gradients as the library's, parameters exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import Recommender, assert_right
from models import HISTORIES
from torch import Tensor, nn

from fisherkern.adapters.parameters import Parameters
from fisherkern.fisher.forward.capture import Capture
from fisherkern.fisher.layers import HANDLERS

N, H, Q, T, D, E = 3, 2, 5, 7, 4, 6
HIDDEN = torch.rand(N, 1, Q, T, generator=torch.Generator().manual_seed(0)) < 0.3
NOTHING = HIDDEN.clone()
NOTHING[1, :, 2] = True  # a query that may attend to no key

SERVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "added mask": {"attn_mask": HIDDEN.double() * -3},
    "bool mask": {"attn_mask": ~HIDDEN},
    "mask of keys": {"attn_mask": ~HIDDEN[:, :, :1]},
    "causal": {"is_causal": True},
    "a query without keys": {"attn_mask": ~NOTHING},
}
LEFT_ALONE: dict[str, dict[str, Any]] = {
    "dropout": {"dropout_p": 0.5},
    "grouped": {"enable_gqa": True},
}


def inputs() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = [(N, H, Q, D), (N, H, T, D), (N, H, T, E)]
    return [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]


def captured(call: dict[str, Any], given: list[Tensor]) -> Tensor:
    with Capture(Parameters(nn.Linear(1, 1)), N, HANDLERS):
        return F.scaled_dot_product_attention(*given, **call)


def is_ours(output: Tensor) -> bool:
    function = output.grad_fn.next_functions[0][0]
    return "Attended" in function.name()


@pytest.mark.parametrize("name", SERVED)
def test_result_and_gradients_are_the_librarys(name: str) -> None:
    given, call = inputs(), SERVED[name]
    expected, found = F.scaled_dot_product_attention(*given, **call), captured(call, given)
    assert is_ours(found)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    delta = torch.randn(expected.shape, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(found, given, delta),
        torch.autograd.grad(expected, given, delta),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SERVED)
def test_many_output_gradients_at_once(name: str) -> None:
    given = inputs()
    output = captured(SERVED[name], given)
    deltas = torch.randn(5, *output.shape, dtype=torch.float64)
    # What has no rule of torch.vmap warns.
    back = torch.vmap(lambda delta: torch.autograd.grad(output, given, delta, retain_graph=True))
    together = back(deltas)
    batched = torch.autograd.grad(output, given, deltas, retain_graph=True, is_grads_batched=True)
    for r, delta in enumerate(deltas):
        exact = torch.autograd.grad(output, given, delta, retain_graph=True)
        for found in (together, batched):
            for one, other in zip(found, exact, strict=True):
                torch.testing.assert_close(one[r], other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_to_the_library(name: str) -> None:
    assert not is_ours(captured(LEFT_ALONE[name], inputs()))


def test_sequences_that_are_broadcast_are_left_to_the_library() -> None:
    query, key, value = inputs()
    assert not is_ours(captured({}, [query[:1], key, value]))


class Attentive(nn.Module):
    """Projections, attention of the last positions over all, and what else a call may be given."""

    def __init__(self, heads: int = 2, learns: bool = False, **call: Any) -> None:
        super().__init__()
        self.heads, self.call = heads, call
        self.query, self.key, self.value, self.output = (nn.Linear(4, 4) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(1)) if learns else None

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        call = dict(self.call)
        if not call.get("is_causal"):
            # Nothing is attended to in a row of padding alone.
            mask = (history == 0)[:, None, None].to(x.dtype) * -torch.inf
            mask = mask.nan_to_num(0.0, neginf=-torch.inf)
            call["attn_mask"] = (
                mask if self.bias is None else mask + self.bias * torch.arange(mask.shape[-1])
            )
        attended = F.scaled_dot_product_attention(q, k, v, **call)
        return self.output(attended.transpose(1, 2).flatten(2))[:, -2:].sum(1)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("call", [{}, {"is_causal": True}, {"scale": 2.0}], ids=str)
def test_every_parameter(
    heads: int, call: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    history = HISTORIES.clone()
    assert_right(Recommender(Attentive(heads, **call)), caplog, history=history)


def test_a_bias_that_learns(caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(Attentive(learns=True)), caplog)
