"""What a stranger's forward gives that is no logits of all items, and what the refusal advises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brute
import pytest
import torch
from helpers.fisher import assert_equal
from helpers.strangers import COLUMNS, Body, Linear
from models import HISTORIES, NUM_ITEMS, shaken
from torch import Tensor, nn

import fisherkern as fk

# Items to score beside a history: as many as it has places, or a few.
ALONGSIDE = HISTORIES.flip(0) % NUM_ITEMS + 1


class States(Body):
    """FMLP-Rec and its kin: the scores of items are made in their trainer."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.states(ids)


class StatesFirst(States):
    """ComiRec and its kin: vectors of the user, then scores."""

    def forward(self, ids: Tensor) -> Any:
        states = self.states(ids)
        return states, states @ self.items.weight.T


class Pairs(Body):
    """TiSASRec and its kin: each place's next item and a drawn one."""

    def forward(self, ids: Tensor, positive: Tensor, negative: Tensor) -> Any:
        return tuple((self.states(ids) * self.items(i)).sum(-1) for i in (positive, negative))


class Drawn(Body):
    """A two-tower model of a mapping: the next item, then drawn ones."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        items = torch.cat([batch["item"][:, None], batch["drawn"]], 1)
        return (self.states(batch["seen"])[:, -1:] * self.items(items)).sum(-1)


class Probabilities(Linear):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).softmax(-1)


class NoForward(States):
    forward = nn.Module.forward  # S3-Rec, which has `finetune`


def scores(model: Any, ids: Tensor) -> Tensor:
    return model.states(ids)[:, -1] @ model.items.weight.T


CASES: dict[str, tuple[type[Body], Any, str, Callable[[Any, Any], Tensor]]] = {
    "states": (States, HISTORIES, "hidden states and no logits", scores),
    "states first": (StatesFirst, HISTORIES, "hidden states and no logits", scores),
    "pairs": (
        Pairs,
        (HISTORIES, ALONGSIDE, ALONGSIDE),
        "the batch's own items",
        lambda model, batch: scores(model, batch[0]),
    ),
    "drawn": (
        Drawn,
        {"seen": HISTORIES, "item": ALONGSIDE[:, 0], "drawn": ALONGSIDE[:, 1:4]},
        "the batch's own items",
        lambda model, batch: scores(model, batch["seen"]),
    ),
    "probabilities": (
        Probabilities,
        HISTORIES,
        "are probabilities",
        lambda model, ids: model(ids).log(),
    ),
    "a list": (
        States,
        [HISTORIES[:, 0], HISTORIES, ALONGSIDE],
        "States.forward does not take a batch of",
        lambda model, batch: scores(model, batch[1]),
    ),
    "missing": (Pairs, HISTORIES, r"'positive' and 'negative'; say how it is called", scores),
    "no forward": (NoForward, HISTORIES, 'missing the required "forward"', scores),
}


class Called(nn.Module):
    """The logits by a function of a model, for brute force over histories."""

    def __init__(self, model: nn.Module, logits: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.model, ids)


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_logits_is_refused_and_the_advice_is_right(case: str) -> None:
    kind, batch, message, logits = CASES[case]
    model = shaken(kind())
    with pytest.raises(fk.InputError, match=message):
        fk.diag_fisher(model, [batch], sampler="exact", progress=False)
    adapted = fk.adapt(model, logits=logits)
    fisher = fk.diag_fisher(adapted, [batch], sampler="exact", progress=False)
    by_history = logits if case == "probabilities" else scores
    p, gradients = brute.all_gradients(Called(model, by_history), HISTORIES)
    right = {n.removeprefix("model."): f for n, f in brute.fisher(gradients, p).items()}
    assert_equal(fisher, right)


def few() -> fk.SequenceDataset:
    ids = ["a", "b", "c", "d"]
    return fk.SequenceDataset("few", [1, 2, 3, 2, 3, 4, 4, 1, 2], [0, 3, 6, 9], ids, ids[:3])


@pytest.mark.parametrize("case", ["states", "missing", "no forward"])
def test_ranks_of_no_logits_are_refused(case: str) -> None:
    """Hidden states may be as many as the items or more."""
    model = shaken(CASES[case][0]())
    data = few()
    with pytest.raises(fk.InputError, match=CASES[case][2]):
        fk.evaluate(fk.adapt(model, max_len=5), data, k=2)
    fk.evaluate(fk.adapt(model, logits=scores, max_len=5, make_batch=lambda ids: ids), data, k=2)


@pytest.mark.parametrize("columns", [COLUMNS - 1, COLUMNS])
def test_a_mask_that_no_history_ends_in_is_said(
    columns: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = Linear()
    model.out = nn.Linear(6, columns)
    ending = fk.adapt(shaken(model), max_len=5, make_batch=lambda ids: ids)
    for asked, said in ((fk.adapt(model, max_len=5), columns < COLUMNS), (ending, False)):
        caplog.clear()
        fk.evaluate(asked, few(), k=2)
        assert ("if the last is a mask" in caplog.text) == said


def test_a_model_s_own_error_says_how_it_was_called() -> None:
    with pytest.raises(IndexError, match="out of range") as raised:
        fk.diag_fisher(shaken(Linear()), [HISTORIES + COLUMNS], progress=False)
    assert "Linear.forward was called with 2 sequences of a batch" in raised.value.__notes__[0]


def test_labels_that_are_padding_are_none() -> None:
    class EveryPosition(Linear):
        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.states(ids))

    model = shaken(EveryPosition())
    labels = torch.where(torch.arange(HISTORIES.shape[1]) % 2 == 1, ALONGSIDE, 0)
    fishers = [
        fk.diag_fisher(model, [{"ids": HISTORIES, "labels": own}], positions="all", progress=False)
        for own in (labels, labels.masked_fill(labels == 0, -100))
    ]
    assert fishers[0].meta["num_positions"] == int((labels > 0).sum())
    assert_equal(fishers[0], dict(fishers[1]))
