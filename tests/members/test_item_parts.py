"""Merges of members whose items are made of parts, across catalogues."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from item_parts import encoder
from torch import Tensor

import fisherkern as fk

PATHS = {
    "x1": ["r", "a"],
    "x2": ["r", "b"],
    "x3": ["s", "c", "d"],
    "x4": ["r"],
    "x5": ["s", "e"],
    "x6": ["r", "a"],
}
TEXT = {item: np.random.default_rng(i).normal(size=3) for i, item in enumerate(PATHS)}
NORTH, SOUTH = ["x1", "x2", "x3", "x4"], ["x3", "x5", "x2", "x6", "x4"]


def member(
    name: str,
    ids: list[str],
    seed: int,
    cold: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    paths: dict[str, list[str]] = PATHS,
    **changes: Any,
) -> Any:
    """A market's model; `without`: items whose content it lacks."""
    text = np.stack([TEXT[item] if item not in without else np.full(3, np.nan) for item in ids])
    parts = fk.ItemParts.of(
        SimpleNamespace(item_ids=ids, attributes=None),
        categories={item: paths[item] for item in ids},
        hierarchy=True,
        content={"text": text},
        cold=cold,
    )
    model = encoder(name, parts, len(ids), **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * seed
    model.item_ids = ids
    return model


def markets(name: str, **changes: Any) -> list[Any]:
    torch.manual_seed(0)
    north = member(name, NORTH, 0, cold=("x3",), without=("x2",), **changes)
    return [north, member(name, SOUTH, 1, cold=("x6", "x4"), **changes)]


def mixed(north: Tensor | None, south: Tensor | None) -> Tensor:
    """Three quarters of the first, where both are there."""
    if north is None or south is None:
        found = south if north is None else north
        assert found is not None
        return found
    return 0.75 * north + 0.25 * south


@pytest.mark.parametrize("name", ["SASRec", "BERT4Rec", "GRU4Rec", "Caser"])
def test_a_merge_unites_categories_by_name_and_knowledge_by_item(name: str) -> None:
    models = markets(name)
    merged = fk.merge(models, weights=[3, 1])
    assert merged.item_ids == ["x1", "x2", "x3", "x4", "x5", "x6"]
    table, tables = merged.item_embedding, [model.item_embedding for model in models]
    assert table.settings["categories"] == [["r", "s"], ["a", "b", "c", "e"], ["d"]]
    order = [c for level in table.settings["categories"] for c in level]
    orders = [[c for level in own.settings["categories"] for c in level] for own in tables]
    for place, category in enumerate(order, start=1):
        rows = [
            own.category.weight[1 + names.index(category)] if category in names else None
            for own, names in zip(tables, orders, strict=True)
        ]
        assert torch.allclose(table.category.weight[place], mixed(*rows), atol=1e-15), category
    for v, item in enumerate(merged.item_ids, start=1):
        path = [order[code - 1] for code in table.codes[v] if code]
        assert sorted(path) == sorted(PATHS[item])
        assert bool(table.has_id[v]) == (item != "x6")  # cold to the only one that sells it
        assert torch.equal(
            table.content.text.values[v], torch.tensor(np.float32(TEXT[item])).double()
        )
        assert table.content.text.known[v]
        rows = []
        for own, ids, cold in zip(tables, (NORTH, SOUTH), (["x3"], ["x4"]), strict=True):
            known = item in ids and item not in cold
            rows.append(own.weight[1 + ids.index(item)] if known else None)
        assert torch.allclose(table.weight[v], mixed(*rows), atol=1e-15), item
    again = type(merged)(**merged.config).double()
    again.load_state_dict(merged.state_dict())
    history = torch.tensor([[1, 5, 3], [0, 0, 6]])
    assert torch.equal(again.eval()(history), merged(history))


def test_shared_content_makes_one_function_of_a_market_and_itself() -> None:
    """A market under other item and category numbers is itself, by every kind of merge."""
    north = markets("SASRec")[0]
    ids = ["x4", "x2", "x1", "x3"]
    other = member("SASRec", ids, 0, cold=("x3",), without=("x2",))
    own, new = north.item_embedding, other.item_embedding
    names = [[c for level in t.settings["categories"] for c in level] for t in (own, new)]
    assert names[0] != names[1]
    with torch.no_grad():
        for item in NORTH:
            new.weight[1 + ids.index(item)] = own.weight[1 + NORTH.index(item)]
        for category in names[0]:
            row = own.category.weight[1 + names[0].index(category)]
            new.category.weight[1 + names[1].index(category)] = row
    history = torch.tensor([[1, 2, 4]])
    renumbered = torch.tensor([[3, 2, 1]])  # x1, x2, x4
    columns = [ids.index(item) for item in NORTH]
    assert torch.allclose(other(renumbered)[:, columns], north(history), atol=1e-12)
    fishers = [
        fk.diag_fisher(north, [history], sampler="exact", progress=False),
        fk.diag_fisher(other, [renumbered], sampler="exact", progress=False),
    ]
    for merged in (fk.merge([north, other]), fk.merge([north, other], fishers=fishers)):
        assert torch.allclose(merged(history), north(history), atol=1e-12)
    back = fk.align([north, other])[1]
    assert torch.allclose(back(renumbered), other(renumbered), atol=1e-12)
    assert back.align_report["distance_before"] < 1e-12


def test_fisher_rows_move_with_their_categories() -> None:
    models = markets("GRU4Rec", hidden_dim=4)
    fishers = []
    for model in models:
        generator = torch.Generator().manual_seed(len(fishers))
        fishers.append(
            {
                name: torch.rand(p.shape, generator=generator).double() + 0.1
                for name, p in model.named_parameters()
            }
        )
    merged = fk.merge(models, fishers=fishers, floor=0.0, normalize=None)
    for north, south, place in ((1, 2, 1), (2, 1, 2)):  # r, s: the second and first of the south
        values = [
            m.item_embedding.category.weight[row]
            for m, row in zip(models, (north, south), strict=True)
        ]
        f = [
            fisher["item_embedding.category.weight"][row]
            for fisher, row in zip(fishers, (north, south), strict=True)
        ]
        expected = (f[0] * values[0] + f[1] * values[1]) / (f[0] + f[1])
        assert torch.allclose(merged.item_embedding.category.weight[place], expected, atol=1e-12)


def test_a_wider_hierarchy_and_more_categories_of_an_item_are_united() -> None:
    torch.manual_seed(0)
    deep = member("SASRec", NORTH, 0)
    flat = member("SASRec", ["x1", "x4"], 1)
    merged = fk.merge([flat, deep], weights=[1, 1])
    table = merged.item_embedding
    assert table.codes.shape[1] == 3 and len(table.level.weight) == 3
    assert torch.equal(table.level.weight[2], deep.item_embedding.level.weight[2])
    assert merged.item_ids == ["x1", "x4", "x2", "x3"]


def test_what_cannot_be_united_is_refused(tmp_path: Path) -> None:
    north, south = markets("SASRec")
    moved = {**PATHS, "x3": ["c", "s"]}
    with pytest.raises(fk.InputError, match="category '[sc]' is at level"):
        fk.merge([north, member("SASRec", ["x3", "x1"], 1, paths=moved)])
    with pytest.raises(fk.InputError, match="codes' of member 1 differs"):
        fk.merge([north, member("SASRec", NORTH, 1, paths={**PATHS, "x4": ["s"]})])
    with pytest.raises(fk.InputError, match="base lists other categories than a member"):
        fk.merge([north, north], base=south, method="task_arithmetic")
    for name, model in (("a", north), ("b", south)):
        fk.save_model(model, tmp_path / f"{name}.safetensors")
    renamed = member("SASRec", NORTH, 0, paths={**PATHS, "x3": ["s", "c", "z"]}, cold=("x3",))
    fk.save_model(renamed, tmp_path / "c.safetensors")
    for other in "bc":
        paths = [tmp_path / "a.safetensors", tmp_path / f"{other}.safetensors"]
        with pytest.raises(fk.InputError, match="categor"):
            fk.merge_files(paths, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
