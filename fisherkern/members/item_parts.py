"""Members whose items are made of parts: categories matched by name, and rows that one lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters import ModelAdapter
from fisherkern.encoders import ItemEmbedding
from fisherkern.errors import InputError, shown
from fisherkern.members.catalogue import CatalogueUnion, align_item_rows, union_item_ids
from fisherkern.members.ties import named_tensors

_TABLE = "item_embedding"


def align_rows(
    models: Sequence[Any], item_ids: Sequence[Sequence[str] | None] | None
) -> CatalogueUnion:
    """Unite the members' catalogues, as `align_item_rows` does, and what their items are made of.

    Categories are matched by name, and a row that no other member knows keeps its values. A member
    has no say in the id row of an item that is cold to it alone, nor in content that it lacks.

    Raises:
        InputError: As `align_item_rows`; or a category stands at two levels.
    """
    adapters = [ModelAdapter.of(model) for model in models]
    catalogue = align_item_rows(adapters, item_ids)
    tables = _tables(adapters)
    if not tables:
        return catalogue
    united = _united_settings(tables)
    others = [*_of_categories(tables, united), *_of_known_rows(tables, catalogue)]
    config = {"items": {**tables[0].settings, **united}}
    return dataclasses.replace(catalogue, others=tuple(others), config=config)


def _tables(models: Sequence[ModelAdapter]) -> list[ItemEmbedding]:
    """Return the members' item tables where all are made of parts; none otherwise."""
    found = [getattr(model.module, _TABLE, None) for model in models]
    tables = [own for own in found if isinstance(own, ItemEmbedding)]
    return tables if len(tables) == len(found) else []


def _united_settings(tables: Sequence[ItemEmbedding]) -> dict[str, Any]:
    """Return the categories of all members, by level, and the most of one item."""
    levels: list[dict[str, None]] = []
    for table in tables:
        for level, names in enumerate(table.settings["categories"]):
            levels += [{}] * (level + 1 - len(levels))
            levels[level] = levels[level] | dict.fromkeys(names)
    level_of: dict[str, int] = {}
    for level, names in enumerate(levels):
        for name in names:
            if level_of.setdefault(name, level) != level:
                raise InputError(
                    f"category {shown(name)} is at level {level_of[name]} of one member and at "
                    f"level {level} of another"
                )
    most = max(table.settings["most"] for table in tables)
    return {"categories": [list(names) for names in levels], "most": most}


def _names(settings: Mapping[str, Any]) -> list[str]:
    return [name for level in settings["categories"] for name in level]


def _of_categories(
    tables: Sequence[ItemEmbedding], united: Mapping[str, Any]
) -> list[CatalogueUnion]:
    """Where each member keeps the rows of categories, and of levels."""
    if all(table.settings["categories"] == united["categories"] for table in tables):
        return []
    lists = [(f"member {m}", _names(table.settings)) for m, table in enumerate(tables)]
    # Led by the united list, so that this is the order of the union.
    union, positions = union_item_ids([("the union", _names(united)), *lists])
    rows = {f"{_TABLE}.category.weight": 1, f"{_TABLE}.levels": 1}
    found = [CatalogueUnion(union, positions[1:], [len(own) for _, own in lists], rows)]
    depths = [len(table.settings["categories"]) for table in tables]
    if len(set(depths)) > 1:
        steps = torch.arange(max(depths))
        places = [torch.where(steps < depth, steps, -1) for depth in depths]
        names = [str(level) for level in range(max(depths))]
        found.append(CatalogueUnion(names, places, depths, {f"{_TABLE}.level.weight": 0}))
    return found


def _of_known_rows(
    tables: Sequence[ItemEmbedding], catalogue: CatalogueUnion
) -> list[CatalogueUnion]:
    """Where each member keeps id rows and content of the items of which it has some."""
    pairs = {"weight": "has_id"}
    pairs |= {f"content.{name}.values": f"content.{name}.known" for name in tables[0].content}
    found, places = [], _places(catalogue)
    for name, known in pairs.items():
        has = _having(tables, places, known)
        anybody = torch.stack(has).any(dim=0)
        lacking = [(place >= 0) & ~own & anybody for place, own in zip(places, has, strict=True)]
        if any(bool(own.any()) for own in lacking):
            positions = [torch.where(no, -1, p) for no, p in zip(lacking, places, strict=True)]
            rows = {f"{_TABLE}.{name}": 1}
            found.append(CatalogueUnion(catalogue.item_ids, positions, catalogue.sizes, rows))
    return found


def _places(catalogue: CatalogueUnion) -> list[Tensor]:
    if catalogue.positions is not None:
        return [place.long() for place in catalogue.positions]
    return [torch.arange(size) for size in catalogue.sizes]


def _having(tables: Sequence[ItemEmbedding], places: Sequence[Tensor], name: str) -> list[Tensor]:
    """Of each member, which items of the union its buffer `name` says yes to, (V,) bool."""
    return [
        torch.where(place >= 0, table.get_buffer(name).cpu()[1 + place], False)
        for table, place in zip(tables, places, strict=True)
    ]


def check_categories(models: Sequence[ModelAdapter]) -> None:
    """Raise InputError unless the last model, a base, and all others list the same categories."""
    lists = [table.settings["categories"] for table in _tables(models)]
    if any(own != lists[-1] for own in lists):
        raise InputError("the base lists other categories than a member, which merge without one")


def united_tensors(
    models: Sequence[nn.Module], catalogue: CatalogueUnion
) -> list[dict[str, Tensor]]:
    """Return the members' tensors by name, codes of categories and what is known as in the union.

    Codes are numbers of the united categories; an item has an id, or content, where any member
    says so.
    """
    found = [named_tensors(model) for model in models]
    tables = _tables([ModelAdapter.of(model) for model in models])
    if not tables:
        return found
    number = {name: code for code, name in enumerate(_names(catalogue.config["items"]), start=1)}
    for table, own in zip(tables, found, strict=True):
        if number:
            codes = torch.tensor([0, *(number[name] for name in _names(table.settings))])
            own[f"{_TABLE}.codes"] = _renumbered(
                table.codes, codes.to(table.codes.device), catalogue.config["items"]["most"]
            )
    places = _places(catalogue)
    for name in ("has_id", *(f"content.{name}.known" for name in tables[0].content)):
        anybody = torch.stack(_having(tables, places, name)).any(dim=0)
        for table, place, own in zip(tables, places, found, strict=True):
            known = table.get_buffer(name).clone()
            known[1 + place[place >= 0].to(known.device)] = anybody[place >= 0].to(known.device)
            own[f"{_TABLE}.{name}"] = known
    return found


def _renumbered(codes: Tensor, number: Tensor, most: int) -> Tensor:
    """Codes (rows, L) by other numbers, ascending with 0 last, (rows, `most`)."""
    new = number[codes]
    last = len(number) + int(number.max())
    ordered = new.masked_fill(new == 0, last).sort(dim=1).values
    wide = torch.nn.functional.pad(ordered, (0, most - codes.shape[1]), value=last)
    return wide.masked_fill(wide == last, 0)
