"""Item embeddings made of parts: their equation, and all that encoders do with them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import brute
import numpy as np
import pytest
import torch
from helpers.alignment import logits, random_transforms
from helpers.fisher import assert_equal, loader, omega_of
from item_parts import CONTENT, DATA, ITEM_IDS, PARTS, PATHS, SIZES, encoder, item_part_objectives
from models import HISTORIES, NUM_ITEMS
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.encoders import ItemEmbedding, stored_encoder
from fisherkern.members.symmetries import fold_norms, symmetries_of, transform_model

LEVELS = {"a": 0, "e": 0, "b": 1, "c": 1, "f": 1, "d": 2}
FISHERS = [("SASRec", "hierarchy"), ("SASRec", "all"), ("Caser", "categories"), ("Caser", "all")]
FISHERS += [("GRU4Rec", "hierarchy"), ("GRU4Rec", "content"), ("BERT4Rec", "content")]
FISHERS += [("YouTubeDNN", "hierarchy")]
SAMPLERS = [("exact", 1), ("topk", 3), ("model", 4), ("random", 9), ("target", 1)]


def vector(table: ItemEmbedding, name: str, v: int) -> list[float]:
    """e_v of the class's docstring, number by number."""
    item, dim = ITEM_IDS[v - 1], table.embedding_dim
    flat = name == "categories"
    order = [c for level in table.settings["categories"] for c in level]
    own = PATHS.get(item, []) if name != "content" else []
    cold = {"hierarchy": ["i9", "i4"], "all": ["i9", "i8", "i4"]}.get(name, [])
    base = [0.0 if item in cold else x for x in table.weight[v].tolist()]
    for c in own:
        rows = [table.category.weight[1 + order.index(c)].tolist()]
        rows += [] if flat else [table.level.weight[LEVELS[c]].tolist()]
        base = [base[d] + sum(row[d] for row in rows) / len(own) for d in range(dim)]
    parts = [base] if own or item not in cold else []
    for kind in table.content:
        f = CONTENT[kind][v - 1].astype(np.float32)
        if not np.isnan(f).any():
            project = table.content[kind].project
            x = project.bias.detach().numpy() + project.weight.detach().numpy() @ f.astype(float)
            parts.append(x.tolist())
    if not len(table.content) or not parts:
        return parts[0] if parts else [0.0] * dim
    q = table.query.weight[0].tolist()
    scores = [
        math.exp(sum(a * b for a, b in zip(q, x, strict=True)) / math.sqrt(dim)) for x in parts
    ]
    return [
        sum(s * x[d] for s, x in zip(scores, parts, strict=True)) / sum(scores) for d in range(dim)
    ]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("kind", SIZES)
def test_vectors_are_the_equation(name: str, kind: str) -> None:
    model = encoder(kind, PARTS[name], tied=True)
    expected = torch.tensor([vector(model.item_embedding, name, v) for v in range(1, 12)])
    tokens = torch.tensor([[0, 3, 3, 8, 9]])
    for found, right in (
        (model.head()[0], expected),
        (model.item_embedding(tokens)[0, 1:], expected[[2, 2, 7, 8]]),
    ):
        assert torch.allclose(found, right.double(), rtol=1e-6)  # content is stored in float32
    assert not model.item_embedding(tokens)[0, 0].any()  # padding, whatever its rows hold
    if kind == "BERT4Rec":
        mask = model.item_embedding(torch.tensor([model.mask_token]))[0]
        assert torch.equal(mask, model.item_embedding.weight[model.mask_token])


def test_a_plain_table_stays_what_it_was() -> None:
    for kind in SIZES:
        model = getattr(fk, kind)(5)
        assert type(model.item_embedding) is nn.Embedding and "items" not in model.config


@pytest.mark.parametrize("kind, name", FISHERS)
def test_the_fisher_equals_brute_force(kind: str, name: str) -> None:
    model = encoder(kind, PARTS[name], tied=(kind, name) != ("Caser", "all"))
    p, gradients = brute.all_gradients(model, HISTORIES)
    for sampler, k in SAMPLERS:
        expected = brute.fisher(gradients, omega_of(sampler, k, p))
        fisher = fk.diag_fisher(model, loader(5), sampler=sampler, k=k, seed=7, progress=False)
        assert_equal(fisher, expected)
        if name == "hierarchy":
            assert not fisher["item_embedding.weight"][[4, 9]].any()  # the cold ones


def test_the_sketch_is_unbiased_and_every_position_counts() -> None:
    model = encoder("GRU4Rec", PARTS["hierarchy"])
    batch = [HISTORIES.repeat(40, 1)]
    exact = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    sketch = fk.diag_fisher(model, batch, sampler="sketch", probes=8, progress=False)
    for name, value in exact.items():
        assert float((sketch[name] - value).norm()) < 0.1 * float(value.norm()), name
    every = fk.diag_fisher(model, [HISTORIES], sampler="exact", positions="all", progress=False)
    total = {name: torch.zeros_like(value) for name, value in every.items()}
    prefixes = [(row, t) for row in HISTORIES for t in range(5) if row[t]]
    for row, t in prefixes:
        p, gradients = brute.all_gradients(model, row[None, : t + 1])
        for name, value in brute.fisher(gradients, p).items():
            total[name] += value / len(prefixes)
    assert_equal(every, total)


@pytest.mark.parametrize("kind", SIZES)
def test_a_model_file_gives_the_model_back(kind: str, tmp_path: Path) -> None:
    model = encoder(kind, PARTS["all"])
    model.item_ids = ITEM_IDS
    fk.save_model(model, tmp_path / "a.safetensors")
    again = fk.load_model(tmp_path / "a.safetensors")
    assert again.config == model.config == json.loads(json.dumps(model.config))
    assert torch.allclose(again(HISTORIES), model(HISTORIES), atol=1e-12)
    twin = fk.ParallelEncoders([model, again])
    fk.save_model(twin, tmp_path / "b.safetensors")
    assert torch.allclose(fk.load_model(tmp_path / "b.safetensors")(HISTORIES), model(HISTORIES))


def data_set(attributes: dict[str, list[int]] | None = None) -> fk.SequenceDataset:
    """Sequences of the items but the cold ones."""
    rows = [[1, 2, 3, 5, 6, 7], [2, 3, 10, 11], [5, 1, 6, 2, 3], [7, 10, 3, 1]]
    ends = np.cumsum([0, *map(len, rows)])
    items = np.concatenate(rows)
    return fk.SequenceDataset("d", items, ends, ITEM_IDS, list("abcd"), attributes)


def test_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    own = item_part_objectives()
    objective = fk.NextItem() + 0.5 * own.ContentContrast() + 0.5 * own.CategoryNeighbours(6)
    parts = dataclasses.replace(PARTS["all"], id_dropout=0.4)

    def run(state: Path | None, stop: int | None = None) -> dict[str, Tensor]:
        def interrupt(epoch: int, *_: object) -> None:
            if epoch == stop:
                raise KeyboardInterrupt

        model = encoder("SASRec", parts, dropout=0.1).float()
        cold = model.item_embedding.weight[[4, 8, 9]].clone()
        settings = {"objective": objective, "state": state, "on_epoch": interrupt}
        fk.train(model, data_set(), epochs=4, batch_size=2, progress=False, **settings)
        moved = (model.item_embedding.weight[[4, 8, 9]] - cold).abs().max()
        assert moved < 0.02 * cold.abs().max()  # weight decay alone
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s.safetensors", stop=3)
    again = run(tmp_path / "s.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_id_dropout_drops_rows_in_training_alone() -> None:
    parts = dataclasses.replace(PARTS["categories"], id_dropout=0.5)
    table = encoder("SASRec", parts).item_embedding
    rows = torch.full((4000,), 1)
    assert len(table(rows).unique(dim=0)) == 1
    table.train()
    torch.manual_seed(0)
    drawn, without = table(rows), table(rows[:1]) * 0
    for c in (1, 2):
        without = without + table.category.weight[c] / 2
    dropped = torch.isclose(drawn, without).all(dim=1)
    assert abs(float(dropped.double().mean()) - 0.5) < 0.03
    assert len(drawn.unique(dim=0)) == 2


def test_cold_items_are_ranked_and_alike_by_their_parts() -> None:
    model = encoder("SASRec", fk.ItemParts.of(DATA, categories=PATHS, cold=["i9", "i2"]))
    scores = model(HISTORIES)
    assert torch.allclose(scores[:, 8], scores[:, 1], atol=1e-12)  # of the same categories
    model.item_ids = ITEM_IDS
    assert fk.evaluate(model, data_set(), k=5)["hr@5"] >= 0
    with pytest.raises(fk.InputError, match="'i12' is not in the data's item_ids"):
        fk.ItemParts.of(DATA, cold=["i12"])


def test_attributes_are_the_categories_of_a_data_set() -> None:
    data = data_set({"i1": [4, 2], "i3": [2]})
    parts = fk.ItemParts.of(data)
    assert parts.categories == [["4", "2"]] and parts.codes[[0, 2]].tolist() == [[1, 2], [2, 0]]


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("tied", [True, False])
def test_symmetries_keep_the_function_and_align_finds_them(kind: str, tied: bool) -> None:
    model = encoder(kind, PARTS["all"], tied=tied)
    symmetries = symmetries_of(model)
    model = fold_norms(model, symmetries)  # which a rotation needs
    turned = transform_model(model, symmetries, random_transforms(symmetries, 3))
    assert torch.allclose(logits(turned), logits(model), atol=1e-12)
    for by, given in (("weights", {}), ("activations", {"loader": [HISTORIES]})):
        back = fk.align([model, turned], by=by, **given)[1]
        assert torch.allclose(logits(back), logits(model), atol=1e-9)
    back = fk.align([model, turned])[1]
    assert back.align_report["distance_after"] < 0.3 * back.align_report["distance_before"]


def with_settings(**changes: object) -> dict[str, object]:
    return {**PARTS["all"].settings(), **changes}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "is neither ItemParts nor their settings"),
        ([1], "is neither ItemParts nor their settings"),
        (with_settings(categories=[["a"], ["a"]]), "categories are not lists of different names"),
        (with_settings(categories={"a": 1}), "categories are not lists"),
        (with_settings(categories=[["a", 3]]), "categories are not lists"),
        (with_settings(categories=[[], ["a"]]), "categories are not lists"),
        (with_settings(content={"a.b": 3}), "content has the name 'a.b'"),
        (with_settings(content={"keys": 3}), "content has the name 'keys'"),
        (with_settings(content=3), "content is 3"),
        (with_settings(content={"text": -1}), "width of content text must be at least 1"),
        (with_settings(most="2"), "most must be an integer"),
        (with_settings(id_dropout=1.0), r"id_dropout must be in \[0, 1\)"),
    ],
)
def test_settings_of_a_file_are_checked(settings: object, message: str) -> None:
    with pytest.raises(fk.InputError, match=message):
        fk.SASRec(NUM_ITEMS, items=settings)
    config = {"num_items": NUM_ITEMS, "items": settings}
    with pytest.raises(fk.InputError, match=f"config does not fit SASRec: .*{message}"):
        stored_encoder("a", "SASRec", config, {"item_embedding.weight": (12, 64)})


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"categories": {"i1": ["a", "b"], "i2": ["b"]}}, "'b' is at level 0 of item 'i2'"),
        ({"categories": {"i99": ["a"]}}, "categories: item 'i99' is not in"),
        ({"content": {"text": np.zeros((3, 2))}}, "text has shape (3, 2) for 11 items"),
        ({"content": {"text": np.zeros(11)}}, "text has shape (11,) for 11 items"),
        ({"id_dropout": "x"}, "items: id_dropout must be in [0, 1), got 'x'"),
        ({"content": {"text": np.full((11, 2), np.inf)}}, "content 'text' holds an infinity"),
    ],
)
def test_parts_that_do_not_fit_are_named(parts: dict, message: str) -> None:
    with pytest.raises(fk.InputError) as error:
        fk.SASRec(NUM_ITEMS, items=fk.ItemParts.of(DATA, hierarchy=True, **parts))
    assert message in str(error.value)
