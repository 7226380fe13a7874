"""Item tables of members with different catalogues, matched by external item id."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherkern.adapters import ModelAdapter
from fisherkern.errors import InputError, shown

log = logging.getLogger("fisherkern")


@dataclass(frozen=True)
class CatalogueUnion:
    """The merged catalogue and where each member keeps its items.

    item_ids: external ids of the merged model, V of them; None if no member has any.
    positions: one (V,) of integers per member, the member's own item index of each merged item, -1
        where it lacks the item; None if all members list the same items in the same order.
    sizes: each member's number of items.
    parameters: name -> row of the member's first item (the same for every member).
    others: unions of rows that are no items, such as categories; a table of theirs is theirs alone.
    config: what the merged model's `config` has in place of the members'.
    """

    item_ids: list[str] | None
    positions: list[Tensor] | None
    sizes: list[int]
    parameters: dict[str, int]
    others: tuple[CatalogueUnion, ...] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def moving(self) -> dict[str, int]:
        """The tables whose rows stand in other places, or are lacking, in some members."""
        found = {} if self.positions is None else dict(self.parameters)
        for other in self.others:
            found |= other.moving
        return found

    def row_maps(self, name: str, lengths: Sequence[int]) -> list[ItemRows] | None:
        """Return where each member's tensor has the merged rows; None where nothing moves.

        `lengths` are the members' row counts. Rows before the first item (padding) and after
        the last (mask) pair up by their place there, whatever the catalogue's size.
        """
        for other in self.others:
            if name in other.parameters:
                return other.row_maps(name, lengths)
        if self.positions is None or name not in self.parameters:
            return None
        first = self.parameters[name]
        after = [length - first - size for length, size in zip(lengths, self.sizes, strict=True)]
        if len(set(after)) > 1 or after[0] < 0:
            raise InputError(
                f"tensor {name!r} has {after} rows after its items, member by member, where all "
                "must have the same number"
            )
        return [
            ItemRows(position, first, size, after[0])
            for size, position in zip(self.sizes, self.positions, strict=True)
        ]

    def rows(self, name: str, lengths: Sequence[int]) -> list[Tensor] | None:
        """Return `row_maps` as tensors: the row that each merged row comes from, -1 for none."""
        maps = self.row_maps(name, lengths)
        return None if maps is None else [own[:] for own in maps]

    def owners(self) -> dict[str, int]:
        """Return number of members owning an item -> number of such items, for the report."""
        if self.positions is None:
            return {str(len(self.sizes)): self.sizes[0]} if self.sizes else {}
        counts = owner_counts(self.positions)
        found = {n: int((counts == n).sum()) for n in range(len(self.positions) + 1)}
        return {str(number): count for number, count in found.items() if count}


@dataclass(frozen=True)
class ItemRows:
    """The row of a member's tensor that each merged row comes from, a slice at a time.

    positions: see `CatalogueUnion`, of any integer type. first: the row of the first item. size:
    the member's number of items. after: rows after its items.
    """

    positions: Tensor
    first: int
    size: int
    after: int

    def __len__(self) -> int:
        return self.first + len(self.positions) + self.after

    def __getitem__(self, part: slice) -> Tensor:
        """Return int64 rows, -1 for none."""
        start, stop, _ = part.indices(len(self))
        items = slice(max(0, start - self.first), max(0, stop - self.first))
        position = self.positions[items].long()
        last = self.first + len(self.positions)
        return torch.cat(
            [
                torch.arange(start, min(stop, self.first)) if start < self.first else position[:0],
                torch.where(position < 0, -1, position + self.first),
                torch.arange(max(start, last), max(stop, last)) + self.size - len(self.positions),
            ]
        )


def owner_counts(positions: Sequence[Tensor]) -> Tensor:
    """Return (V,) int16, how many members have each merged item."""
    counts = torch.zeros(len(positions[0]), dtype=torch.int16)
    for position in positions:
        counts += position >= 0
    return counts


def _member_ids(
    models: Sequence[ModelAdapter], item_ids: Sequence[Any] | None
) -> list[list[str] | None]:
    """Each member's external ids: the argument's, or else the model's own, or else None."""
    if item_ids is not None and len(item_ids) != len(models):
        raise InputError(f"item_ids has {len(item_ids)} lists for {len(models)} members")
    found: list[list[str] | None] = []
    for number, model in enumerate(models):
        given = item_ids[number] if item_ids is not None else None
        own = model.item_ids if given is None else model.ids_in(given)
        if own is None:
            found.append(None)
            continue
        check_ids(f"member {number}", own, model.num_items)
        found.append(own)
    return found


def check_ids(owner: str, ids: Sequence[str], size: int | None) -> None:
    """Raise InputError for an id listed twice, or as many ids as there are not items."""
    if len(set(ids)) != len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(f"{owner} has item id {shown(twice)} twice in its item_ids")
    if size is not None and size != len(ids):
        raise InputError(f"{owner} has {size} items but {len(ids)} item_ids")


def union_item_ids(
    catalogues: Iterable[tuple[str, Sequence[str]]],
) -> tuple[list[str], list[Tensor]]:
    """Return the union, the first's ids first, then new ones; and `CatalogueUnion.positions`.

    catalogues: owner and ids of each; asked for one after another and not kept. Raises
    InputError, naming the owner, for an id listed twice.
    """
    place: dict[str, int] = {}
    found = []
    for owner, own in catalogues:
        merged = (place.setdefault(item, len(place)) for item in own)
        numbers = torch.from_numpy(np.fromiter(merged, np.int64, len(own)))
        _positions(numbers, len(place), owner, own)
        found.append(numbers)
        # Before the next is made; the generator, which has not come to its end, holds it too.
        del merged, own
    union = list(place)
    del place  # the larger part of what is held by now
    found.reverse()
    return union, [_positions(found.pop(), len(union)) for _ in range(len(found))]


def positions_of(ids: Sequence[str], own: Sequence[str], owner: str) -> Tensor:
    """Return (V,) int64, where each of `ids` stands in `own`, the ids of `owner`; -1 for none."""
    place = {item: position for position, item in enumerate(own)}
    if len(place) < len(own):
        check_ids(owner, own, None)
    return torch.from_numpy(np.fromiter((place.get(item, -1) for item in ids), np.int64, len(ids)))


def _positions(
    numbers: Tensor, size: int, owner: str = "", own: Sequence[str] | None = None
) -> Tensor:
    """(size,) int64, where each merged item stands in a catalogue that lists `numbers` of them.

    -1 where it does not. With `own`, the ids that the numbers stand for, each must be there once.
    """
    places = torch.arange(len(numbers))
    position = torch.full((size,), -1)
    position[numbers] = places
    if own is not None and not torch.equal(position[numbers], places):
        check_ids(owner, own, None)
    return position


def _item_parameters(models: Sequence[ModelAdapter]) -> dict[str, int]:
    """Return the members' common tables with a row for each item."""
    tables = [model.item_parameters for model in models]
    for number, table in enumerate(tables):
        if table != tables[0]:
            raise InputError(
                f"member {number} has item_parameters {table} where member 0 has {tables[0]}"
            )
    return tables[0]


def align_item_rows(
    models: Sequence[Any], item_ids: Sequence[Sequence[str] | None] | None
) -> CatalogueUnion:
    """Unite the members' catalogues: member 0's items first, then the new ones in order.

    Members without ids must all be without, and have the same number of items: their rows are
    taken to mean the same item, which is logged once. Raises InputError otherwise, for an id
    listed twice, for as many ids as there are not items, and for a member that shares no item
    with the others.
    """
    adapters = [ModelAdapter.of(model) for model in models]
    ids = _member_ids(adapters, item_ids)
    sizes = [
        len(own) if own is not None else adapter.num_items or 0
        for own, adapter in zip(ids, adapters, strict=True)
    ]
    for number, own in enumerate(ids):
        if (own is None) != (ids[0] is None) or (own is None and sizes[number] != sizes[0]):
            lacking = number if own is None else 0
            raise InputError(
                f"member {lacking} has no item_ids, so its item rows cannot be matched with those "
                f"of member {0 if lacking else number}: set model.item_ids or pass item_ids="
            )
    known = [own for own in ids if own is not None]
    if not known or all(own == known[0] for own in known):
        _check_tensors(adapters)
        _note_missing(adapters, known)
        declared = all(model.library.item_tables(model.module) is not None for model in adapters)
        tables = _item_parameters(adapters) if declared else {}
        return CatalogueUnion(known[0] if known else None, None, sizes, tables)
    parameters = _item_parameters(adapters)
    if not parameters:
        raise InputError(
            "the members list different items, and without an item_parameters() method their "
            "item rows cannot be told from other rows"
        )
    union, positions = union_item_ids((f"member {m}", own) for m, own in enumerate(known))
    _check_overlap(known)
    return CatalogueUnion(union, positions, sizes, parameters)


def _check_overlap(catalogues: Sequence[Sequence[Any]]) -> None:
    """Refuse a member that has no item in common with any other: its ids are written otherwise."""
    counts = Counter(item for own in catalogues for item in set(own))
    for number, own in enumerate(catalogues):
        if own and all(counts[item] == 1 for item in own):
            other = catalogues[0 if number else 1]
            raise InputError(
                f"member {number} shares no item with the others: its ids are like "
                f"{shown(own[0])}, "
                f"theirs like {shown(other[0])}; write them alike"
            )


def _check_tensors(models: Sequence[ModelAdapter]) -> None:
    """Refuse tensors of that name that differ: whether they are ids is not known."""
    found = [getattr(model.module, "item_ids", None) for model in models]
    tensors = [own.detach().cpu() for own in found if isinstance(own, Tensor)]
    if any(not torch.equal(own, tensors[0]) for own in tensors):
        raise InputError("the members' item_ids are tensors that differ: give them as lists")


_noted: set[str] = set()


def _note_missing(models: Sequence[ModelAdapter], known: Sequence[Any]) -> None:
    """Say once per kind of model that rows are taken to mean the same items."""
    kind = models[0].library.name
    if known or len(models) < 2 or not models[0].num_items or kind in _noted:
        return
    _noted.add(kind)
    log.warning(
        "no member lists its item ids: row v is taken to be the same item in all; pass item_ids= "
        "where the members were trained on other data"
    )
