"""Whether a model's parameters are all served by rules, and right, against brute force."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import brute
import pytest
import torch
from models import HISTORIES, NUM_ITEMS
from torch import Tensor, nn

import fisherkern as fk
from helpers.fisher import assert_equal

# As many sequences as positions; fewer; and a single one, in batches of their own.
SIZES = [5, 3, 2, 1]


class Recommender(nn.Module):
    """Item embedding, a body of one's own, and a decoder: the least that recommends.

    `body` maps (N, T, D) to a state (N, D); the history comes along, for its padding.
    """

    def __init__(
        self, body: Callable[[Tensor, Tensor], Tensor], width: int = 4, out: int | None = None
    ) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, width, padding_idx=0)
        self.body = body
        self.decoder = nn.Linear(out or width, NUM_ITEMS + 1)

    def forward(self, history: Tensor) -> Tensor:
        return self.decoder(self.body(self.items(history), history))


def _clamped(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The logits, no linear map any more, so that probes go through the output layer as well.

    A NumPy batch is taken whole, also where it has as many positions.
    """
    return model(torch.from_numpy(batch["whole"])).clamp(-1e9, 1e9)


def assert_right(
    model: nn.Module,
    caplog: pytest.LogCaptureFixture,
    *,
    fallback: Sequence[str] = (),
    history: Tensor = HISTORIES,
) -> None:
    """Every parameter to 1e-9, with `fallback` naming those, and only those, that no rule took."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.7, generator=generator)
    p, gradients = brute.all_gradients(model, history)
    subject = fk.adapt(model, logits=_clamped)
    with caplog.at_level(logging.WARNING, logger="fisherkern"):
        fisher = fk.diag_fisher(
            subject, [{"whole": history.numpy()}], sampler="exact", progress=False
        )
    assert_equal(fisher, brute.fisher(gradients, p))
    # Other libraries log as well, when another test has let them.
    own = [record for record in caplog.records if record.name == "fisherkern"]
    messages = [record.getMessage().partition(":")[0] for record in own]
    assert messages == ([f"no rule for {', '.join(sorted(fallback))}"] if fallback else [])
