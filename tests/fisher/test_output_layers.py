"""Output weights that are a table's rows, scaled by their lengths, against autograd."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import brute
import pytest
import torch
import torch.nn.functional as F
from helpers.fisher import TARGETS, assert_equal, omega_of
from helpers.strangers import COLUMNS, Body, Flat
from models import HISTORIES, NUM_ITEMS, shaken
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.fisher.factors import samplers


def by_root(rows: Tensor) -> Tensor:
    """As RecTools' cosine similarity."""
    return rows / (rows.square().sum(1, keepdim=True) + 1e-2).sqrt()


def by_clamp(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=0.8)


def by_half(rows: Tensor) -> Tensor:
    return rows * 0.5


PAIRS = [(HISTORIES[:2], TARGETS[:2]), (HISTORIES[2:], TARGETS[2:])]
SCALINGS = {"normalize": F.normalize, "root": by_root, "clamp": by_clamp, "half": by_half}


class Cosine(Body):
    """A softmax over cosines with a temperature; the table is looked up whole where `whole`."""

    def __init__(
        self,
        tied: bool = True,
        bias: bool = False,
        whole: bool = True,
        scaling: Callable[[Tensor], Tensor] = F.normalize,
        first: int = 1,
    ) -> None:
        super().__init__()
        self.output = None if tied else nn.Embedding(COLUMNS, 6, padding_idx=0)
        self.bias = nn.Parameter(torch.zeros(COLUMNS - first)) if bias else None
        self.whole, self.scaling, self.first = whole, scaling, first

    def table(self) -> Tensor:
        source = self.items if self.output is None else self.output
        return source(torch.arange(COLUMNS)) if self.whole else source.weight

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.scaling(self.table()[self.first :])
        h = F.normalize(self.states(ids), dim=-1) / 0.2
        return F.linear(h, rows, self.bias)


def expected(model: nn.Module, sampler: str = "exact", k: int = 3) -> dict[str, Tensor]:
    p, gradients = brute.all_gradients(Flat(model), HISTORIES)
    found = brute.fisher(gradients, omega_of(sampler, k, p))
    return {name.removeprefix("model."): value for name, value in found.items()}


def found(model: nn.Module, **settings: Any) -> fk.DiagFisher:
    adapted = fk.adapt(model, first_item=1)
    return fk.diag_fisher(adapted, PAIRS, progress=False, seed=7, **settings)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_rows_scaled_by_their_length(scaling: str, tied: bool, whole: bool) -> None:
    model = shaken(Cosine(tied, True, whole, SCALINGS[scaling]))
    fisher = found(model, sampler="exact")
    assert_equal(fisher, expected(model))
    assert fisher.meta["probes"] == 6


@pytest.mark.parametrize("sampler", ["topk", "model", "random", "target"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("k", [3, 9])
def test_scaled_rows_of_sampled_items(sampler: str, tied: bool, k: int) -> None:
    model = shaken(Cosine(tied, bias=k == 3))
    count = None if sampler == "target" else k
    assert_equal(found(model, sampler=sampler, k=count), expected(model, sampler, k))


@pytest.mark.parametrize("limit", [0, 2**28])
@pytest.mark.parametrize("tied", [True, False])
def test_scaled_rows_in_a_sketch_of_everything(
    limit: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "_COVARIANCE_LIMIT", limit)
    model = shaken(Cosine(tied))
    fisher = found(model, sampler="sketch", probes=NUM_ITEMS)
    assert_equal(fisher, expected(model))


def test_a_padding_row_gets_no_output_part_and_may_be_looked_up() -> None:
    class Looks(Cosine):
        """Row 0 is scored without a gradient, and looked up with one."""

        def states(self, ids: Tensor) -> Tensor:
            return torch.tanh(self.layer(F.embedding(ids, self.items.weight).cumsum(1)))

    for scaling in (F.normalize, lambda rows: rows * 1.0):
        model = shaken(Looks(first=0, scaling=scaling))
        model.position = None
        p, gradients = brute.all_gradients(Flat(model), HISTORIES)
        wanted = brute.fisher(gradients, p)
        fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
        assert fisher.meta["probes"] == 6
        assert_equal(fisher, {n.removeprefix("model."): v for n, v in wanted.items()})
        assert float(fisher["items.weight"][0].norm()) > 0


def test_rows_of_zeros() -> None:
    model = shaken(Cosine(scaling=by_root))
    with torch.no_grad():
        model.items.weight[4] = 0.0
    assert_equal(found(model, sampler="exact"), expected(model))


@pytest.mark.parametrize("tied", [True, False])
def test_scaled_rows_at_every_position(tied: bool) -> None:
    model = shaken(Cosine(tied, True))
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for ids in HISTORIES:
        for t in ids.nonzero()[:, 0].tolist():
            log_p = model(ids[None])[0, t].log_softmax(0)
            for value in log_p:
                grads = torch.autograd.grad(
                    value, list(named.values()), retain_graph=True, materialize_grads=True
                )
                for name, g in zip(named, grads, strict=True):
                    total[name] += value.detach().exp() * g.square() / int((HISTORIES != 0).sum())
    assert_equal(found(model, sampler="exact", positions="all"), total)


class WithGain(Cosine):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))

    def table(self) -> Tensor:
        return super().table() * self.gain


def centred(rows: Tensor) -> Tensor:
    return F.layer_norm(rows, rows.shape[1:])


def shifted(rows: Tensor) -> Tensor:
    return F.normalize(rows) + 0.1


def mixed(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=0)


def turned(rows: Tensor) -> Tensor:
    """The cosine's values; what lies across a row has a gradient along it."""
    square = rows.square().sum(1, keepdim=True)
    across = rows.view(-1, 3, 2).flip(2) * torch.tensor([1.0, -1.0])
    return F.normalize(rows) + across.view(rows.shape) * (square - square.detach())


@pytest.mark.parametrize("scaling", [centred, shifted, mixed, turned, None])
def test_other_computed_weights_go_through_the_logits(scaling: Any) -> None:
    model = shaken(WithGain() if scaling is None else Cosine(scaling=scaling))
    fisher = found(model, sampler="exact")
    assert_equal(fisher, expected(model))
    assert fisher.meta["probes"] == NUM_ITEMS


def test_a_scaling_is_that_of_the_table_as_it_is() -> None:
    model = shaken(Cosine())
    adapted = fk.adapt(model, first_item=1, example=PAIRS[0])
    assert adapted.row_scaling is not None
    with torch.no_grad():
        model.items.weight.mul_(1.7).add_(0.3)
    fisher = fk.diag_fisher(adapted, PAIRS, sampler="exact", progress=False)
    assert_equal(fisher, expected(model))


def test_single_precision_stays_on_the_fast_path(caplog: pytest.LogCaptureFixture) -> None:
    model = shaken(Cosine())
    wanted = expected(model)
    with caplog.at_level(logging.WARNING, "fisherkern"):
        fisher = found(model.float(), sampler="exact")
    assert fisher.meta["probes"] == 6
    assert not caplog.records
    assert_equal(fisher, {n: v.float() for n, v in wanted.items()}, 1e-4)
