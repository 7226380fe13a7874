"""torch.nn's attention: every parameter against brute force, and served by rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.layers import SIZES, Recommender, assert_right
from models import HISTORIES, NUM_ITEMS
from torch import Tensor, nn

from fisherkern.adapters.parameters import Parameters
from fisherkern.fisher.forward.capture import Capture
from fisherkern.fisher.layers import HANDLERS


class Encoder(nn.Module):
    """torch.nn.TransformerEncoder over the positions, causal, padding masked."""

    def __init__(self, batch_first: bool, masks: bool, width: int = 4, **kwargs: Any) -> None:
        super().__init__()
        self.batch_first, self.masks = batch_first, masks
        layer = nn.TransformerEncoderLayer(width, 2, 5, batch_first=batch_first, **kwargs)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width))

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        masks: dict[str, Any] = {}
        if self.masks:
            t = history.shape[1]
            causal = torch.ones(t, t, dtype=torch.bool).triu(1)
            # Not for the first position, which would be left with nothing to attend to.
            padding = (history == 0) & (torch.arange(t) > 0)
            masks = {"mask": causal, "src_key_padding_mask": padding}
        if self.batch_first:
            return self.encoder(x, **masks)[:, -1]
        return self.encoder(x.transpose(0, 1), **masks)[-1]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks, norm_first", [(True, False), (False, True)])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer_encoder(
    batch_first: bool, masks: bool, norm_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    body = Encoder(batch_first, masks, norm_first=norm_first, activation="gelu")
    assert_right(Recommender(body), caplog)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer_encoder_on_any_number(
    batch_first: bool, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert_right(Recommender(Encoder(batch_first, True)), caplog, history=HISTORIES[-size:])


class Attention(nn.Module):
    """One nn.MultiheadAttention on queries, keys and values of one's own making."""

    def __init__(self, inputs: str, call: dict[str, Any], **kwargs: Any) -> None:
        super().__init__()
        self.inputs, self.call = inputs, call
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **kwargs)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        query, key, value = torch.tanh(x), x * 2, torch.cos(x)
        given = {
            "self": (query, query, query),
            "cross": (query, key, key),
            "three": (query, key, value),
            "wide": (query, torch.cat([key, value], 2), torch.cat([key, value, x], 2)),
        }
        output, weights = self.attention(*given[self.inputs], **self.call)
        # The weights of attention are a result too.
        return output.sum(1) if weights is None else output.sum(1) + weights.square().sum(1)[:, -4:]


BIAS = torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)
# All but the last position, which is left to attend to.
FIRST = torch.arange(5) < 4
ATTENTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "self": ("self", {}, {}),
    "cross, no weights": ("cross", {"need_weights": False}, {}),
    "three, no bias": ("three", {}, {"bias": False}),
    "separate weights": ("wide", {"need_weights": False}, {"kdim": 8, "vdim": 12}),
    "additive mask": ("self", {"attn_mask": BIAS}, {}),
    "mask of every head": (
        "self",
        {"attn_mask": BIAS * torch.arange(10)[:, None, None], "need_weights": False},
        {},
    ),
    "causal hint": (
        "self",
        {"attn_mask": BIAS > 0.9, "is_causal": True, "need_weights": False},
        {},
    ),
    "both masks": (
        "cross",
        {"attn_mask": (BIAS > 0.3) & FIRST, "key_padding_mask": (HISTORIES == 0) & FIRST},
        {},
    ),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_forward_is_the_librarys(name: str) -> None:
    """The replacement computes what PyTorch does, masks, weights and all."""
    inputs, call, kwargs = ATTENTIONS[name]
    torch.manual_seed(0)
    module = Attention(inputs, call, **kwargs).double().eval()
    x = torch.randn(5, 5, 4, dtype=torch.float64)
    expected = module(x, HISTORIES)
    with Capture(Parameters(module), 5, HANDLERS) as capture:
        found = module(x, HISTORIES)
    assert len(capture.ops) >= 2
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_weights_of_every_head_are_the_librarys() -> None:
    module = nn.MultiheadAttention(4, 2).double().eval()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    call = {"average_attn_weights": False}
    expected = module(x, x, x, **call)
    with Capture(Parameters(module), 3, HANDLERS):
        found = module(x, x, x, **call)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert found[1].shape == (3, 2, 5, 5)


# A mask of every sequence's heads cannot be given to the sequences one at a time.
@pytest.mark.parametrize("name", sorted(set(ATTENTIONS) - {"mask of every head", "both masks"}))
def test_attention(name: str, caplog: pytest.LogCaptureFixture) -> None:
    inputs, call, kwargs = ATTENTIONS[name]
    assert_right(Recommender(Attention(inputs, call, **kwargs)), caplog)


def test_unusual_attention_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    body = Attention("self", {"need_weights": False}, add_bias_kv=True)
    names = [f"body.attention.{n}" for n, _ in body.attention.named_parameters()]
    assert_right(Recommender(body), caplog, fallback=names)


class AlsoElsewhere(Attention):
    """The output weight in a function without a rule."""

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        return super().forward(x, history) + torch.hypot(
            x.sum(1), self.attention.out_proj.weight[0]
        )


def test_a_use_elsewhere_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    body = AlsoElsewhere("self", {})
    assert_right(Recommender(body), caplog, fallback=["body.attention.out_proj.weight"])


class SASRec(nn.Module):
    """As the usual PyTorch port has it: sums in place, time-first attention, kernels of one."""

    def __init__(self, layers: int = 2, width: int = 4) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, width, padding_idx=0)
        self.position = nn.Embedding(6, width, padding_idx=0)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(width, 2) for _ in range(layers))
        self.inner = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.outer = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))

    def forward(self, history: Tensor) -> Tensor:
        x = self.items(history)
        x *= x.shape[2] ** 0.5
        places = torch.arange(1, history.shape[1] + 1).expand_as(history) * (history != 0)
        x += self.position(places)
        t = history.shape[1]
        mask = ~torch.ones(t, t, dtype=torch.bool).tril()
        for i, attention in enumerate(self.attentions):
            x = x.transpose(0, 1)
            query = self.norms[2 * i](x)
            x = query + attention(query, x, x, attn_mask=mask)[0]
            x = self.norms[2 * i + 1](x.transpose(0, 1))
            hidden = torch.relu_(self.inner[i](x.transpose(1, 2)))
            x = x + self.outer[i](hidden).transpose(1, 2)
        return self.norms[-1](x)[:, -1] @ self.items.weight.t()


@pytest.mark.parametrize("size", SIZES)
def test_sasrec(size: int, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(SASRec(), caplog, history=HISTORIES[:size])
