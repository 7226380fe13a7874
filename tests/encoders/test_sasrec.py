"""SASRec against the paper's equations written out position by position."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from models import shaken
from torch import Tensor, nn

from fisherkern.encoders import SASRec
from fisherkern.errors import InputError

V, MAX_LEN, D = 11, 7, 6
TOKENS = torch.tensor(
    [[0, 0, 0, 0, 7], [1, 2, 3, 4, 5], [0, 6, 6, 6, 2], [0, 0, 0, 0, 0], [3, 0, 0, 9, 3]]
)


def make(**changes: object) -> SASRec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(SASRec(V, MAX_LEN, D, **changes))


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm(x) = α (x − μ) / sqrt(σ² + ε) + β (section III.B)."""
    mean = sum(x) / D
    variance = sum((x - mean) ** 2) / D
    return layer.weight * (x - mean) / torch.sqrt(variance + 1e-5) + layer.bias


def affine(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.stack([sum(row * x) for row in layer.weight]) + layer.bias


def attention(block: nn.Module, xs: list[Tensor], items: list[bool]) -> list[Tensor]:
    """Σ_j softmax_j(q_t · k_j / sqrt(D / heads)) v_j over the items j <= t, and t itself."""
    layer, heads = block.attention, block.attention.heads
    width = D // heads
    query, key, value = ([affine(m, x) for x in xs] for m in (layer.query, layer.key, layer.value))
    found = []
    for t in range(len(xs)):
        seen = [j for j in range(t + 1) if items[j] or j == t]
        parts = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            weights = [torch.exp(sum(query[t][own] * key[j][own]) / math.sqrt(width)) for j in seen]
            total = sum(w * value[j][own] for w, j in zip(weights, seen, strict=True))
            parts.append(total / sum(weights))
        found.append(affine(layer.output, torch.cat(parts)))
    return found


def feed_forward(block: nn.Module, x: Tensor, activation: str) -> Tensor:
    """FFN(x) = f(x W1 + b1) W2 + b2 (equation 5 with relu)."""
    inner = affine(block.feed_forward.inner, x)
    if activation == "relu":
        inner = torch.where(inner > 0, inner, 0.0)
    else:
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    return affine(block.feed_forward.outer, inner)


def written_out(model: SASRec, tokens: Tensor) -> Tensor:
    """The states (T, D) of one sequence."""
    config = model.config
    width = len(tokens)
    items = [bool(token) for token in tokens]
    factor = math.sqrt(D) if config["scaled"] else 1.0
    rows = [
        factor * model.item_embedding.weight[token]
        + model.position_embedding.weight[MAX_LEN - width + t]
        for t, token in enumerate(tokens)
    ]
    if config["norm"] == "post":
        rows = [norm(model.embedding_norm, x) for x in rows]
    for block in model.blocks:
        if config["norm"] == "pre":
            normed = [norm(block.attention_norm, x) for x in rows]
            added = attention(block, normed, items)
            rows = [x + a for x, a in zip(rows, added, strict=True)]
            rows = [
                x + feed_forward(block, norm(block.feed_forward_norm, x), config["activation"])
                for x in rows
            ]
        else:
            added = attention(block, rows, items)
            rows = [norm(block.attention_norm, x + a) for x, a in zip(rows, added, strict=True)]
            rows = [
                norm(block.feed_forward_norm, x + feed_forward(block, x, config["activation"]))
                for x in rows
            ]
    if config["norm"] == "pre":
        rows = [norm(model.final_norm, x) for x in rows]
    return torch.stack(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"heads": 3, "inner_dim": 5, "layers": 1},
        {"norm": "post", "activation": "gelu", "scaled": False, "heads": 2, "inner_dim": 9},
        {"norm": "post", "layers": 3},
    ],
)
def test_states_and_logits_are_the_papers(changes: dict[str, object]) -> None:
    model = make(**changes)
    with torch.no_grad():
        expected = torch.stack([written_out(model, tokens) for tokens in TOKENS])
        assert (model.states(TOKENS) - expected).abs().max() < 1e-12
        assert (model.encode(TOKENS) - expected[:, -1]).abs().max() < 1e-12
        logits = [
            [sum(h * model.item_embedding.weight[v]) for v in range(1, V + 1)]
            for h in expected[:, -1]
        ]
        assert (model(TOKENS) - torch.tensor(logits)).abs().max() < 1e-12


def test_padding_is_seen_by_nobody() -> None:
    model, other = make(), make()
    with torch.no_grad():
        other.item_embedding.weight[0] = 100.0
    items = TOKENS != 0
    assert torch.equal(other.states(TOKENS)[items], model.states(TOKENS)[items])


def test_the_last_block_computes_the_last_position_alone() -> None:
    model = make()
    calls: dict[str, list[torch.Size]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            module.register_forward_hook(
                lambda _, inputs, __, name=name: calls.setdefault(name, []).append(inputs[0].shape)
            )
    model.encode(F.pad(TOKENS[2:3], (2, 0)))
    assert all(len(shapes) == 1 for shapes in calls.values())
    assert calls["position_embedding"] == [(1, 4)]  # padding is not computed
    assert calls["blocks.0.feed_forward.inner"] == [(1, 4, D)]
    # The last block reads keys and values of no position: one query needs neither.
    assert "blocks.1.attention.key" not in calls and "blocks.1.attention.value" not in calls
    for last in ("attention.query", "attention.output", "feed_forward.inner", "feed_forward.outer"):
        assert [shape.numel() for shape in calls[f"blocks.1.{last}"]] == [D]
    calls.clear()
    model.encode(TOKENS[[3, 3]])
    assert calls["position_embedding"] == [(2, 1)]


@pytest.mark.parametrize("tied, bias", list(itertools.product([True, False], repeat=2)))
def test_the_head_is_a_view_of_the_parameters(tied: bool, bias: bool) -> None:
    model = make(tied=tied, bias=bias)
    weight, b = model.head()
    table = model.item_embedding.weight
    assert (weight.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()) == tied
    assert torch.equal(weight, table[1:]) if tied else weight is model.output_embedding
    assert b is model.output_bias and (b is not None) == bias


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = SASRec(1000, dim=64, tied=False, bias=True)
    assert model.config["inner_dim"] == 64 and model.config["attention_dropout"] == 0.2
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.full_like(parameter, not name.endswith("bias")))
        elif "embedding" in name:
            assert parameter.std().item() == pytest.approx(0.88 * 0.02, rel=0.05), name
        else:
            assert parameter.var().item() == pytest.approx(2 / sum(parameter.shape), rel=0.1), name
    assert not model.item_embedding.weight[0].any()


def test_attention_dropout_is_its_own() -> None:
    model = make(dropout=0.0, attention_dropout=0.5).train()
    assert not torch.equal(model(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers": 0}, "layers must be at least 1"),
        ({"heads": 4}, "heads = 4 does not divide dim = 6"),
        ({"inner_dim": 0}, "inner_dim must be at least 1"),
        ({"norm": "both"}, "norm must be 'post' or 'pre', got 'both'"),
        ({"activation": "tanh"}, "activation must be 'relu' or 'gelu', got 'tanh'"),
        ({"attention_dropout": 1.0}, "attention_dropout must be in"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"^SASRec: {message}"):
        make(**changes)
