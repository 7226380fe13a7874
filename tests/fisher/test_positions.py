"""The Fisher of every position, against autograd at each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fisher import assert_equal
from models import HISTORIES, NUM_ITEMS, bert, shaken
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.adapters import ModelAdapter
from fisherkern.adapters.batches import mapped
from fisherkern.fisher.engine import Engine
from fisherkern.fisher.settings import Settings

COLUMNS = NUM_ITEMS + 1


@pytest.fixture(autouse=True)
def one_model_a_test() -> None:
    """Initial weights are drawn anew, so that a mean over draws is the same in any order."""
    torch.manual_seed(0)


# Runs, each over so many copies of the batch, whose draws are independent.
SEEDS, COPIES = 12, 100


class Causal(nn.Module):
    """A causal model with logits at every position, tied or not, with a bias or without."""

    def __init__(self, tied: bool, bias: bool) -> None:
        super().__init__()
        self.items = nn.Embedding(COLUMNS, 6, padding_idx=0)
        self.layer = nn.Linear(6, 6)
        self.output = None if tied else nn.Parameter(torch.zeros(COLUMNS, 6))
        self.bias = nn.Parameter(torch.zeros(COLUMNS)) if bias else None

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.layer(self.items(ids).cumsum(1)))
        weight = self.items.weight if self.output is None else self.output
        return F.linear(h, weight, self.bias)


class Bent(Causal):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(super().forward(ids))


def by_position(
    model: nn.Module, ids: Tensor, counted: Tensor, labels: Tensor | None = None
) -> list[dict[str, Tensor]]:
    """Σ_y ω_y g² of every position that counts; ω = p, or p at the label alone."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = []
    for n, t in counted.nonzero().tolist():
        log_p = model(ids[n : n + 1])[0, t].log_softmax(0)
        total = {name: torch.zeros_like(p) for name, p in named.items()}
        for y in range(len(log_p)) if labels is None else [int(labels[n, t])]:
            grads = torch.autograd.grad(
                log_p[y], list(named.values()), retain_graph=True, materialize_grads=True
            )
            for name, g in zip(named, grads, strict=True):
                total[name] += log_p[y].detach().exp() * g.square()
        found.append(total)
    return found


def mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Causal, Bent])
def test_every_position_of_every_item(kind: type[Causal], tied: bool, bias: bool) -> None:
    model = shaken(kind(tied, bias))
    wanted = mean(by_position(model, HISTORIES, HISTORIES != 0))
    fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", positions="all", progress=False)
    assert_equal(fisher, wanted)
    assert fisher.meta["num_positions"] == int((HISTORIES != 0).sum())
    parts = [HISTORIES[:2], HISTORIES[2:]]
    again = fk.diag_fisher(model, parts, sampler="exact", positions=9, chunk=1, progress=False)
    assert_equal(again, wanted)


def test_labels_say_which_positions_count() -> None:
    model = shaken(Causal(True, True))
    labels = HISTORIES.roll(-1, 1)
    labels[:, -1] = -100
    labels[HISTORIES == 0] = -100
    labels[1, 2] = -100

    class WithLabels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids)

    batch = {"ids": HISTORIES, "labels": labels}
    one = WithLabels()
    for sampler, own in (("exact", None), ("target", labels)):
        wanted = mean(by_position(model, HISTORIES, labels != -100, own))
        if sampler == "target":
            # One pass serves all positions: only its expectation is the sum.
            settings = {"sampler": sampler, "k": None, "probes": None, "positions": "all"}
            check_mean(one, batch, settings, {f"model.{n}": v for n, v in wanted.items()})
            continue
        fisher = fk.diag_fisher(one, [batch], sampler=sampler, positions="all", progress=False)
        assert_equal(fisher, {f"model.{name}": value for name, value in wanted.items()})


def check_mean(
    model: nn.Module, batch: Any, settings: dict[str, Any], wanted: dict[str, Tensor]
) -> None:
    """The mean over seeds lies inside its own standard error of the truth.

    The engine's sums are looked at before `finish`, which holds them above zero.
    """
    draws: dict[str, list[Tensor]] = {name: [] for name in wanted}
    copies = mapped(batch, lambda name, value: value.repeat(COPIES, 1))
    for seed in range(SEEDS):
        rest = {"tol": None, "rescale": False, "weight": "probability", "seed": seed}
        engine = Engine(ModelAdapter.of(model), Settings(**settings, **rest).checked())
        engine.add_batch(copies, 0)
        for name, total in engine.fisher.items():
            draws[name].append(total / float(engine.num_positions))
    for name, value in wanted.items():
        sample = torch.stack(draws[name])
        error = sample.mean(0) - value.flatten()
        standard_error = sample.std(0) / SEEDS**0.5
        allowed = 6 * standard_error + 1e-9 * float(value.abs().max())
        assert (error.abs() <= allowed).all(), name
        # A bias of a quarter would be noticed in the tensor's sum.
        assert float(sample.sum(1).std() / SEEDS**0.5) < 0.3 * float(value.sum()), name


@pytest.mark.parametrize("sampler", ["sketch", "model", "topk"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", ["all", 2])
def test_one_pass_serves_all_positions(sampler: str, tied: bool, positions: Any) -> None:
    model = shaken(Causal(tied, True))
    wanted = mean(by_position(model, HISTORIES, HISTORIES != 0))
    settings = {
        "sampler": sampler,
        "k": COLUMNS if sampler == "topk" else 5,
        "probes": 3 if sampler == "sketch" else None,
        "positions": positions,
    }
    check_mean(model, HISTORIES, settings, wanted)


def test_our_causal_encoders_predict_everywhere_and_others_do_not() -> None:
    torch.manual_seed(0)
    model = shaken(fk.SASRec(num_items=NUM_ITEMS, max_len=5, dim=6, heads=2, layers=1))

    class Everywhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = model

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.m.transform(self.m.states(ids)), *self.m.head())

    parts = by_position(Everywhere(), HISTORIES, HISTORIES != 0)
    wanted = {name.removeprefix("m."): value for name, value in mean(parts).items()}
    fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", positions="all", progress=False)
    assert_equal(fisher, wanted)
    with pytest.raises(fk.InputError, match="a BERT4Rec predicts after the last item only"):
        fk.diag_fisher(bert(), [HISTORIES], positions="all", progress=False)


def test_what_cannot_be_asked_is_refused() -> None:
    model = shaken(Causal(True, False))
    for given, message in [
        ("every", "'every' is not 'last', 'all'"),
        (0, "0 is not 'last', 'all'"),
        (True, "True is not 'last', 'all'"),
    ]:
        with pytest.raises(fk.InputError, match=message):
            fk.diag_fisher(model, [HISTORIES], positions=given, progress=False)
    with pytest.raises(fk.InputError, match="needs a label for every position"):
        fk.diag_fisher(model, [HISTORIES], sampler="target", positions="all", progress=False)
    last = fk.adapt(model, logits=lambda model, ids: model(ids)[:, -1])
    with pytest.raises(fk.InputError, match="logits of the last position alone"):
        fk.diag_fisher(last, [HISTORIES], positions="all", progress=False)
    with pytest.raises(fk.InputError, match="takes the last position only"):
        fk.diag_fisher(model, [HISTORIES], positions="all", reduction="batchwise", progress=False)
