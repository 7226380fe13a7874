"""The output layer of any model, found and compared; what is no function of a sequence."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from helpers.fisher import assert_equal
from helpers.strangers import (
    COLUMNS,
    SPLIT,
    Bent,
    Body,
    Linear,
    Scaled,
    WholeTable,
    expected,
)
from models import HISTORIES, shaken
from torch import Tensor, nn

import fisherkern as fk


@pytest.mark.parametrize("kind", [*SPLIT, Bent])
def test_output_layers_are_found(kind: type[Body]) -> None:
    model = shaken(kind())
    fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    assert_equal(fisher, expected(model))
    split = fk.adapt(model, example=HISTORIES).head is not None
    assert split == (kind is not Bent)
    assert fisher.meta["probes"] == (6 if split and kind is not WholeTable else COLUMNS)


class Random(Linear):
    def forward(self, ids: Tensor) -> Tensor:
        return self.out(F.dropout(self.states(ids)[:, -1], 0.5))


class MeanOfBatch(Linear):
    def forward(self, ids: Tensor) -> Tensor:
        h = self.states(ids)[:, -1]
        return self.out(h - h.mean(0))


class BatchNorm(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.norm(self.states(ids)[:, -1]))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Random, "two passes over one batch"),
        (MeanOfBatch, "depend on the other sequences"),
        (BatchNorm, "depend on the other sequences"),
    ],
)
def test_what_is_no_function_of_a_sequence_is_refused(kind: type[Body], message: str) -> None:
    with pytest.raises(fk.InputError, match=message):
        fk.diag_fisher(shaken(kind()), [HISTORIES], progress=False)


def test_an_encoder_and_head_that_disagree_with_the_logits_are_refused() -> None:
    model = shaken(Scaled())
    wrong = fk.adapt(
        model,
        logits=lambda model, ids: model(ids),
        encode=lambda model, ids: model.states(ids)[:, -1],
        head=lambda model: (model.items.weight, None),
    )
    with pytest.raises(fk.InputError, match="does the model scale, normalise or bias"):
        fk.diag_fisher(wrong, [HISTORIES], progress=False)


class OwnHead(Linear):
    """A method that is called head and takes the hidden state."""

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.states(ids)[:, -1]

    def head(self, h: Tensor) -> Tensor:
        return self.out(h)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encode(ids))


def test_a_models_own_head_is_not_taken_for_ours() -> None:
    model = shaken(OwnHead())
    fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    assert_equal(fisher, expected(model))


def test_the_default_number_of_items_fits_a_small_catalogue() -> None:
    model = shaken(Linear())
    fisher = fk.diag_fisher(model, [HISTORIES], progress=False)
    assert fisher.meta["k"] == COLUMNS and fisher.meta["captured_mass"] == pytest.approx(1)
    assert_equal(fisher, expected(model))
    with pytest.raises(fk.InputError, match="k: 13 items of a catalogue of 12"):
        fk.diag_fisher(model, [HISTORIES], k=13, progress=False)
