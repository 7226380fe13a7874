"""Wrappers are taken off and put back; whatever is adapted goes in everywhere."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brute
import pytest
import torch
from helpers.fisher import assert_equal
from helpers.strangers import (
    Linear,
    Tied,
)
from models import HISTORIES, NUM_ITEMS, bert, shaken
from torch import Tensor, nn

import fisherkern as fk


class LightningLike(nn.Module):
    """A module that a trainer drives, with a loss and metrics beside the network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(self.network(batch[0]), batch[1])


class HandsOn(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Any) -> Tensor:
        return self.inner(batch)


class Doubles(HandsOn):
    """No wrapper: it computes something of its own."""

    def forward(self, batch: Any) -> Tensor:
        return 2 * self.inner(batch)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: list[Callable[[nn.Module], Any]] = [
    nn.DataParallel,
    compiled,
    torch.optim.swa_utils.AveragedModel,
    LightningLike,
    HandsOn,
    lambda model: HandsOn(nn.DataParallel(model)),
]


def reordered(model: Any, seed: int) -> Any:
    """The model with its items in another order, and ids that say so."""
    order = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(seed))
    new = copy.deepcopy(model)
    with torch.no_grad():
        for name, row in model.item_parameters().items():
            table = new.get_parameter(name)
            table[row : row + NUM_ITEMS] = model.get_parameter(name)[row : row + NUM_ITEMS][order]
    new.item_ids = [f"i{int(v)}" for v in order]
    return new


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_are_taken_off_and_put_back(wrap: Callable[[nn.Module], Any]) -> None:
    a, b = bert(), bert()
    a.item_ids = [f"i{v}" for v in range(NUM_ITEMS)]
    shaken(b, seed=5, scale=0.05)
    shuffled = reordered(b, 1) if a.item_ids else b
    bare = [fk.diag_fisher(m, [HISTORIES], progress=False, k=3) for m in (a, shuffled)]
    wrapped = [wrap(copy.deepcopy(a)), wrap(copy.deepcopy(shuffled))]
    fishers = [fk.diag_fisher(m, [HISTORIES], progress=False, k=3) for m in wrapped]
    for one, other in zip(bare, fishers, strict=True):
        assert list(one) == list(other)
        for name in one:
            torch.testing.assert_close(one[name], other[name])
    merged = fk.merge(wrapped, fishers=fishers)
    assert type(merged) is type(wrapped[0])
    inner = fk.adapt(merged).module
    wanted = fk.merge([a, shuffled], fishers=bare)
    assert inner.item_ids == a.item_ids
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(inner.state_dict()[name], value)
    assert fk.preflight(wrapped).cosine == fk.preflight([a, shuffled]).cosine
    mixed = fk.merge([wrapped[0], shuffled])
    assert fk.adapt(mixed).module.state_dict().keys() == wanted.state_dict().keys()


def test_a_module_that_computes_is_no_wrapper() -> None:
    model = Doubles(bert())
    adapted = fk.adapt(model, example=HISTORIES)
    assert adapted.module is model
    assert adapted.item_parameters == {"inner.item_embedding.weight": 1, "inner.output_bias": 0}
    fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    p, gradients = brute.all_gradients(model, HISTORIES)
    assert_equal(fisher, brute.fisher(gradients, p))


@pytest.mark.parametrize("kind", [torch.jit.script, torch.fx.symbolic_trace])
def test_scripted_and_traced_modules_are_no_wrappers(kind: Callable[[nn.Module], Any]) -> None:
    models = []
    for _ in range(2):
        model = nn.Sequential(nn.Embedding(NUM_ITEMS + 1, 4), nn.Flatten())
        model.add_module("module", nn.Linear(4 * HISTORIES.shape[1], NUM_ITEMS))
        models.append(kind(model.double()))
    fisher = fk.diag_fisher(models[0], [HISTORIES], sampler="exact", progress=False)
    p, gradients = brute.all_gradients(models[0], HISTORIES)
    assert_equal(fisher, brute.fisher(gradients, p))
    merged = fk.merge(models).state_dict()
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(merged[name], (value + models[1].state_dict()[name]) / 2)
    other = nn.Sequential(nn.Embedding(NUM_ITEMS + 1, 4), nn.ReLU(), nn.Flatten())
    other.add_module("module", nn.Linear(4 * HISTORIES.shape[1], NUM_ITEMS))
    with pytest.raises(fk.InputError, match="has another in member 1 and has one code"):
        fk.merge([models[0], kind(other.double())])


def test_a_class_of_any_name_merges() -> None:
    for name in ("SASRec", "BERT4Rec", "GRU4Rec", "Caser"):
        kind = type(name, (Linear,), {"config": {"norm": "x"}})
        models = [shaken(kind(), seed) for seed in (0, 1)]
        merged = fk.merge(models)
        torch.testing.assert_close(
            merged.out.weight, (models[0].out.weight + models[1].out.weight) / 2
        )
        assert fk.preflight(models).verdict
        with pytest.raises(fk.InputError, match="no symmetries are known"):
            fk.align(models)


def sequences(folder: Path) -> fk.SequenceDataset:
    """30 users' histories of 6 of the items."""
    generator = torch.Generator().manual_seed(0)
    lines = [
        f"{user} {int(item) + 1}"
        for user in range(30)
        for item in torch.randperm(NUM_ITEMS, generator=generator)[:6]
    ]
    path = folder / "made.txt"
    path.write_text("\n".join(lines) + "\n")
    return fk.load(str(path))


def test_adapted_models_go_in_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = sequences(tmp_path)
    a, b = (shaken(Tied(), seed) for seed in (0, 1))
    adapted = [
        fk.adapt(
            model,
            logits=lambda model, batch: model(batch["history"]),
            first_item=1,
            max_len=5,
            item_ids=data.item_ids,
        )
        for model in (a, b)
    ]
    batches = list(data.loader(split="train", batch_size=16, max_len=5))
    fishers = [fk.diag_fisher(m, batches, k=3, progress=False) for m in adapted]
    merged = fk.merge(
        adapted,
        fishers=fishers,
        weights="search",
        steps=2,
        score=lambda m: fk.evaluate(m, data, k=10)["ndcg@10"],
    )
    assert isinstance(merged, type(adapted[0]))
    assert 0 < fk.evaluate(merged, data, k=10)["ndcg@10"] < 1
    learned = fk.merge(
        adapted,
        method="learned_soup",
        steps=2,
        validation=data.loader(split="validation", batch_size=16, max_len=5),
    )
    assert learned.merge_report["method"] == "learned_soup"
    grams = [fk.linear_grams(m, batches, progress=False) for m in adapted]
    assert fk.merge(adapted, method="regmean", grams=grams).merge_report["method"] == "regmean"
    assert fk.preflight(adapted, score=lambda m: fk.evaluate(m, data, k=10)["ndcg@10"]).scores
    with caplog.at_level(logging.WARNING, logger="fisherkern"):
        fk.merge([a, b])


def test_catalogues_in_other_orders_are_matched_by_id(tmp_path: Path) -> None:
    data = sequences(tmp_path)
    model = shaken(Tied())
    order = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(3))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.items.weight[1:] = model.items.weight[1:][order]
        other.bias[1:] = model.bias[1:][order]
    ids = [data.item_ids[int(v)] for v in order]
    assert data.num_items == NUM_ITEMS

    def adapted(m: nn.Module, own: list[str]) -> Any:
        return fk.adapt(
            m, logits=lambda m, batch: m(batch["history"]), first_item=1, max_len=5, item_ids=own
        )

    one, two = adapted(model, data.item_ids), adapted(other, ids)
    assert fk.evaluate(one, data, k=10)["ndcg@10"] == fk.evaluate(two, data, k=10)["ndcg@10"]
    merged = fk.merge([one, two])
    torch.testing.assert_close(merged.module.items.weight, model.items.weight)
    torch.testing.assert_close(merged.module.bias, model.bias)
    with pytest.raises(fk.InputError, match="shares no item with the others"):
        fk.merge([one, adapted(other, [f"{item}.0" for item in ids])])


class ScoresByFunction(Linear):
    """x-transformers with a tied table: a function among its attributes holds the model."""

    def __init__(self) -> None:
        super().__init__()
        self.out.requires_grad_(False)
        self.score = lambda h, *, scale=1.5: scale * (h @ self.items.weight.T)

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(self.states(ids)[:, -1])


def test_a_copy_of_a_model_scores_with_its_own_table() -> None:
    pair = [shaken(ScoresByFunction(), seed) for seed in (0, 1)]
    before = [model(HISTORIES) for model in pair]
    merged = fk.merge(pair)
    right = ScoresByFunction().double()
    right.load_state_dict(merged.state_dict())
    assert torch.equal(merged(HISTORIES), right(HISTORIES))
    assert all(torch.equal(z, model(HISTORIES)) for z, model in zip(before, pair, strict=True))
