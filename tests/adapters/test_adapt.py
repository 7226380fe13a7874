"""Models as strangers have them: wrappers, batches, output layers and mistakes, by brute force."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import brute
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.fisher import assert_equal
from models import HISTORIES, NUM_ITEMS, bert, shaken
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.adapters.batches import batch_size, batch_take, to_device

COLUMNS = NUM_ITEMS + 1


class Body(nn.Module):
    """Item and position vectors and a layer: states (N, T, D)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.items = nn.Embedding(COLUMNS, width, padding_idx=0)
        self.position = nn.Parameter(torch.zeros(5, width))
        self.layer = nn.Linear(width, width)

    def states(self, ids: Tensor) -> Tensor:
        x = self.items(ids) + self.position
        return torch.tanh(self.layer(x.cumsum(1)))


class Linear(Body):
    """A last linear layer with a bias, at the last position."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, COLUMNS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.states(ids)[:, -1])


class LastView(Linear):
    """Logits of every position, of which the last are returned."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.states(ids))[:, -1]


class EveryPosition(Linear):
    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.states(ids))


class Tied(Body):
    """A product with the item table, padding left out of the softmax, a bias added later."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(COLUMNS))

    def forward(self, ids: Tensor) -> Tensor:
        scores = self.states(ids)[:, -1] @ self.items.weight.T + self.bias
        return scores[:, 1:]


class Scaled(Body):
    """Logits divided by a temperature."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.states(ids)[:, -1], self.items.weight) / 0.7


class FrozenHead(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.out.requires_grad_(False)


class WholeTable(Body):
    """The item table looked up whole, indexed and scored with, as RecTools has it."""

    def forward(self, ids: Tensor) -> Tensor:
        table = torch.stack([self.items(torch.arange(COLUMNS))]).sum(0)
        x = table[ids] + self.position
        h = torch.tanh(self.layer(x.cumsum(1)))[:, -1]
        return h @ table.T


class Output(NamedTuple):
    loss: None
    logits: Tensor


class InAnObject(Linear):
    def forward(self, ids: Tensor) -> Any:
        return Output(None, super().forward(ids))


class Bent(Linear):
    """No linear map comes last."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(super().forward(ids))


SPLIT = [Linear, LastView, EveryPosition, Tied, Scaled, FrozenHead, WholeTable, InAnObject]


class Flat(nn.Module):
    """A model's next-item logits (N, V), for the oracle."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        z = self.model(ids)
        z = z.logits if isinstance(z, Output) else z
        return z[:, -1] if z.dim() == 3 else z


def expected(model: nn.Module) -> dict[str, Tensor]:
    p, gradients = brute.all_gradients(Flat(model), HISTORIES)
    return {n.removeprefix("model."): f for n, f in brute.fisher(gradients, p).items()}


@pytest.mark.parametrize("kind", [*SPLIT, Bent])
def test_output_layers_are_found(kind: type[Body]) -> None:
    model = shaken(kind())
    fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    assert_equal(fisher, expected(model))
    split = fk.adapt(model, example=HISTORIES).head is not None
    assert split == (kind is not Bent)
    assert fisher.meta["probes"] == (6 if split and kind is not WholeTable else COLUMNS)


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


class Features(NamedTuple):
    ids: Tensor
    mask: Tensor


@dataclasses.dataclass
class Record:
    ids: Tensor
    users: list[str]
    extra: Mapping[str, Any]


NESTED = {
    "features": {"ids": HISTORIES, "position_ids": torch.arange(5)[None]},
    "users": list("abcde"),
    "scale": 2.0,
}


@pytest.mark.parametrize(
    "batch",
    [
        NESTED,
        Features(HISTORIES, HISTORIES != 0),
        Record(HISTORIES, list("abcde"), {"rows": HISTORIES.numpy(), "none": None}),
        (HISTORIES, torch.arange(5)),
        [HISTORIES, {"lengths": torch.arange(5)}],
        HISTORIES.numpy(),
    ],
)
def test_batches_are_cut_to_batches_of_their_kind(batch: Any) -> None:
    assert batch_size(batch) == 5
    for index in (slice(1, 3), torch.tensor([1, 2])):
        part = batch_take(batch, index)
        assert type(part) is type(batch) and batch_size(part) == 2
    moved = to_device(batch, torch.device("cpu"))
    assert type(moved) is type(batch)


def test_what_all_sequences_share_is_not_cut() -> None:
    part = batch_take(NESTED, slice(1, 3))
    assert part["features"]["position_ids"].shape == (1, 5)
    assert part["users"] == ["b", "c"] and part["scale"] == 2.0
    rows = batch_take({"x": np.arange(10).reshape(5, 2)}, torch.tensor([4, 0]))
    assert rows["x"].tolist() == [[8, 9], [0, 1]]


def test_tensors_of_other_lengths_are_refused_by_name() -> None:
    with pytest.raises(fk.InputError, match="history has 5, target has 4"):
        batch_size({"history": HISTORIES, "target": torch.arange(4)})


class ByName(Linear):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids * (1 if attention_mask is None else attention_mask))


class WithLengths(Linear):
    """A second argument: how many places each sequence has, padded on the right."""

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.out(self.states(ids)[torch.arange(len(ids)), lengths - 1])


def test_a_batch_is_handed_over_as_forward_takes_it() -> None:
    model = shaken(ByName())
    batch = {"input_ids": HISTORIES, "attention_mask": (HISTORIES != 0).long(), "user": [1] * 5}
    fisher = fk.diag_fisher(model, [batch], sampler="exact", progress=False)
    assert_equal(fisher, expected(model))
    pair = shaken(WithLengths())
    lengths = torch.tensor([5, 3, 2, 5, 1])
    fisher = fk.diag_fisher(pair, [(HISTORIES, lengths)], sampler="exact", progress=False)
    rows = [
        brute.all_gradients(nn.Sequential(_Fixed(pair, lengths[i : i + 1])), HISTORIES[i : i + 1])
        for i in range(5)
    ]
    totals = {
        name.removeprefix("0.model."): sum(
            torch.einsum("nv,nv...->...", p, g[name].square()) for p, g in rows
        )
        / 5
        for name in rows[0][1]
    }
    assert_equal(fisher, totals)


class _Fixed(nn.Module):
    def __init__(self, model: nn.Module, lengths: Tensor) -> None:
        super().__init__()
        self.model, self.lengths = model, lengths

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, self.lengths)


def test_the_last_position_is_the_last_real_one() -> None:
    """Padded on the right with a mask: what a mask hides is not asked."""

    class Masked(EveryPosition):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.out(self.states(input_ids))

    model = shaken(Masked())
    lengths = [3, 5, 1, 4, 2]
    ids = torch.zeros(5, 5, dtype=torch.int64)
    for row, length in zip(range(5), lengths, strict=True):
        ids[row, :length] = HISTORIES[1, :length]
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    z = fk.adapt(model)(batch)
    every = model(ids, None)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(z[row], every[row, length - 1])
    with pytest.raises(fk.InputError, match="some sequences end in 0"):
        plain = shaken(_NoPadding())
        fk.diag_fisher(plain, [ids], progress=False)


class _NoPadding(EveryPosition):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(COLUMNS, 6)


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


def test_the_default_number_of_items_fits_a_small_catalogue() -> None:
    model = shaken(Linear())
    fisher = fk.diag_fisher(model, [HISTORIES], progress=False)
    assert fisher.meta["k"] == COLUMNS and fisher.meta["captured_mass"] == pytest.approx(1)
    assert_equal(fisher, expected(model))
    with pytest.raises(fk.InputError, match="k: 13 items of a catalogue of 12"):
        fk.diag_fisher(model, [HISTORIES], k=13, progress=False)
