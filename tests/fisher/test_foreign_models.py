"""Real classes of other libraries: every parameter against brute force, and no fallback."""

from __future__ import annotations

import logging
from typing import Any

import brute
import pytest
import torch
from helpers.fisher import assert_equal
from helpers.layers import assert_right
from models import HISTORIES, NUM_ITEMS, shaken
from torch import Tensor, nn

import fisherkern as fk


class SharedPositions(nn.Module):
    """Positions looked up once, (T, D) or (1, T, D), and added to every sequence."""

    def __init__(self, leading: bool) -> None:
        super().__init__()
        self.leading = leading
        self.items = nn.Embedding(NUM_ITEMS + 1, 4)
        self.position = nn.Embedding(9, 4)
        self.mix = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, NUM_ITEMS + 1)

    def forward(self, history: Tensor) -> Tensor:
        ids = torch.arange(history.shape[1]) % 3  # a position twice: summed before squaring
        x = self.items(history) + self.position(ids[None] if self.leading else ids)
        return self.decoder(torch.tanh(self.mix(x)).sum(1))


@pytest.mark.parametrize("leading", [True, False])
@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("known", [True, False])
def test_positions_shared_by_all_sequences(
    leading: bool, size: int, known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With as many sequences as positions, (T, D) cannot be told from (N, D): the fallback.

    Where the number of positions can be seen, fewer sequences are taken at once.
    """
    model = shaken(SharedPositions(leading))
    batch = HISTORIES[:size]
    p, gradients = brute.all_gradients(model, batch)
    subject = model if known else fk.adapt(model, logits=from_numpy)
    with caplog.at_level(logging.WARNING, logger="fisherkern"):
        given = [batch if known else {"ids": batch.numpy()}]
        fisher = fk.diag_fisher(subject, given, sampler="exact", progress=False)
    assert_equal(fisher, brute.fisher(gradients, p))
    assert len(caplog.records) == (not leading and size == 5 and not known)


def from_numpy(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(torch.from_numpy(batch["ids"]))


class LastLogits(nn.Module):
    """A masked language model's logits at the last position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: Tensor) -> Tensor:
        mask = (history > 0).long()
        return self.model(input_ids=history, attention_mask=mask).logits[:, -1]


def test_hugging_face_gpt2(caplog: pytest.LogCaptureFixture) -> None:
    """Products of flattened (N·T, D), a query, key and value in one, positions (1, T), a tie."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=NUM_ITEMS + 1, n_embd=8, n_layer=2, n_head=2, n_inner=12, n_positions=8
    )
    model = LastLogits(transformers.GPT2LMHeadModel(config))
    assert_right(model, caplog, history=HISTORIES[:3].flip(1))


@pytest.mark.parametrize("path", ["logits", "factored"])
def test_hugging_face_bert(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Output weight and bias tied by alias, positions (1, T), a pooler-free BertForMaskedLM."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=NUM_ITEMS + 1,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
    )
    model = LastLogits(shaken(transformers.BertForMaskedLM(config)))
    p, gradients = brute.all_gradients(model, HISTORIES[:3])

    def encode(model: nn.Module, history: Tensor) -> Tensor:
        bert = model.model.bert(input_ids=history, attention_mask=(history > 0).long())
        return model.model.cls.predictions.transform(bert.last_hidden_state[:, -1])

    def head(model: nn.Module) -> tuple[Tensor, Tensor]:
        embeddings = model.model.bert.embeddings.word_embeddings
        return embeddings.weight, model.model.cls.predictions.bias

    subject = fk.adapt(model, encode=encode, head=head) if path == "factored" else model
    with caplog.at_level(logging.WARNING, logger="fisherkern"):
        fisher = fk.diag_fisher(subject, [HISTORIES[:3]], sampler="exact", progress=False)
    assert fisher.meta["probes"] == 8
    expected = brute.fisher(gradients, p)
    # Attention's key biases have Fisher 0; assert_equal knows them by our encoders' name.
    keys = {name for name in expected if name.endswith("self.key.bias")}
    assert_equal(
        fk.DiagFisher({n: v for n, v in fisher.items() if n not in keys}, {}),
        {n: v for n, v in expected.items() if n not in keys},
    )
    assert not [record for record in caplog.records if record.name == "fisherkern"]
