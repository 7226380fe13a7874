"""Item embeddings made of parts: an id row, categories of a hierarchy, and content."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fisherkern.checks import check_count, check_unit
from fisherkern.errors import InputError, shown

_SETTINGS = {"categories", "most", "content", "id_dropout"}


class Catalogue(Protocol):
    """What `ItemParts.of` reads of a data set; `SequenceDataset` has it."""

    item_ids: Any
    attributes: Any


@dataclasses.dataclass(frozen=True, eq=False)
class ItemParts:
    """What the items of a catalogue are made of, as the argument `items` of an encoder.

    `of` makes one from a data set.

    Args:
        categories: names by level of the hierarchy, the uppermost level first.
        codes: (V, L) int64, the categories of each item, counted from 1 over all levels; 0 is none.
        content: arrays (V, F) float32 by name; a row of NaN for an item without.
        has_id: (V,) bool, false for a cold item, whose id row is left out.
        id_dropout: share of id rows that training leaves out, anew at every lookup, in [0, 1).
    """

    categories: Sequence[Sequence[str]]
    codes: Tensor
    content: Mapping[str, Tensor]
    has_id: Tensor
    id_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_unit("items: id_dropout", self.id_dropout, "[0, 1)")

    @classmethod
    def of(
        cls,
        data: Catalogue,
        *,
        categories: Mapping[str, Sequence[Any]] | None = None,
        hierarchy: bool = False,
        content: Mapping[str, ArrayLike] | None = None,
        cold: Sequence[str] = (),
        id_dropout: float = 0.0,
    ) -> ItemParts:
        """Read the parts of the items of a data set.

        Args:
            data: the data set, whose `item_ids` are the catalogue.
            categories: external item id -> names of its categories. None: the data's `attributes`.
            hierarchy: the names of an item are a path from the root, so that the place of a name is
                its level. Otherwise all are of one level.
            content: (V, F) numbers by name, row v - 1 of item v; a row of NaN for an item without.
            cold: external ids of items without an id row, which training never saw.
            id_dropout: see the class.

        Raises:
            InputError: an item or a category out of place, or an array of another shape.
        """
        given = (data.attributes or {}) if categories is None else categories
        number = {item: row for row, item in enumerate(data.item_ids)}
        for what, items in (("categories", given), ("cold", cold)):
            unknown = next((item for item in items if item not in number), None)
            if unknown is not None:
                raise InputError(f"{what}: item {shown(unknown)} is not in the data's item_ids")
        names = {item: list(dict.fromkeys(map(str, own))) for item, own in given.items()}
        levels = _levels(names, hierarchy)
        order = [name for level in levels for name in level]
        code = {name: place for place, name in enumerate(order, start=1)}
        codes = torch.zeros(len(number), max(map(len, names.values()), default=0), dtype=torch.long)
        for item, own in names.items():
            codes[number[item], : len(own)] = torch.tensor(
                sorted(code[name] for name in own)
            ).long()
        new = frozenset(cold)
        has_id = torch.tensor([item not in new for item in data.item_ids])
        arrays = {
            name: torch.from_numpy(np.array(array, dtype=np.float32))
            for name, array in (content or {}).items()
        }
        return cls(levels, codes, arrays, has_id, id_dropout)

    def settings(self) -> dict[str, Any]:
        """Return the JSON values from which an encoder's tables are built, empty."""
        return {
            "categories": [list(level) for level in self.categories],
            "most": self.codes.shape[1],
            "content": {name: array.shape[-1] for name, array in self.content.items()},
            "id_dropout": float(self.id_dropout),
        }


def _levels(names: Mapping[str, Sequence[str]], hierarchy: bool) -> list[list[str]]:
    """Return the categories of every level; each is on one level alone."""
    level_of: dict[str, int] = {}
    for item, own in names.items():
        for place, name in enumerate(own):
            level = place if hierarchy else 0
            if level_of.setdefault(name, level) != level:
                raise InputError(
                    f"categories: {shown(name)} is at level {level} of item {shown(item)} and at "
                    f"level {level_of[name]} of another"
                )
    depth = max(level_of.values(), default=-1) + 1
    return [[name for name, own in level_of.items() if own == level] for level in range(depth)]


class ItemEmbedding(nn.Embedding):
    """Vectors of items made of parts; `weight` (rows, D) has the id rows.

    For item v with categories C_v, of levels l(c), and content f_vk (F_k,), k = 1..K,

        x_v0 = has_id_v id_v + (1/|C_v|) Σ_{c in C_v} (category_c + level_{l(c)})
        x_vk = A_k f_vk + a_k
        e_v = Σ_k α_vk x_vk,   α_v = softmax_k( <q, x_vk> / sqrt(D) )

    over the parts that v has: x_v0 with an id or a category, x_vk with the content. Without any,
    e_v = 0. There is no level_l where all categories are of one level, and no q without content.
    Padding is 0; a mask token has an id alone. A cold item is one without an id. A lookup of n rows
    holds n x L x D numbers, L the most categories of an item.

    Args:
        rows: padding, V items, and what comes after them.
        dim: D.
        items: the parts, or their settings: then the tables are empty, to be loaded.
        padding_idx: as `nn.Embedding` takes it.

    Raises:
        InputError: parts of another catalogue, or settings that are none.

    Source:
        Categories, levels and neighbours as in HIER, arXiv 2411.03143; fusion and contrast of ids
        and content as in IDSF, arXiv 2311.05956. The formulas are ours.
    """

    codes: Tensor
    levels: Tensor
    has_id: Tensor

    def __init__(
        self,
        rows: int,
        num_items: int,
        dim: int,
        items: ItemParts | Mapping[str, Any],
        padding_idx: int | None,
    ) -> None:
        super().__init__(rows, dim, padding_idx=padding_idx)
        self.settings = _settings_of(items)
        sizes = [len(level) for level in self.settings["categories"]]
        if sizes:
            self.category = nn.Embedding(1 + sum(sizes), dim, padding_idx=0)
            levels = [level for level, size in enumerate(sizes) for _ in range(size)]
            self.register_buffer("levels", torch.tensor([0, *levels]))
            self.register_buffer("codes", torch.zeros(rows, self.settings["most"]).long())
        if len(sizes) > 1:
            self.level = nn.Embedding(len(sizes), dim)
        self.register_buffer("has_id", torch.ones(rows, dtype=torch.bool))
        self.has_id[0] = False
        widths = self.settings["content"]
        self.content = nn.ModuleDict({name: _Content(rows, n, dim) for name, n in widths.items()})
        if widths:
            self.query = nn.Linear(dim, 1, bias=False)
        if isinstance(items, ItemParts):
            self._fill(items, num_items)

    def _fill(self, parts: ItemParts, num_items: int) -> None:
        """Write the parts into the rows of the items."""
        items = slice(1, 1 + num_items)
        for name, array in {"codes": parts.codes, "has_id": parts.has_id, **parts.content}.items():
            if len(array) != num_items or array.dim() != (1 if name == "has_id" else 2):
                raise InputError(
                    f"items: {name} has shape {tuple(array.shape)} for {num_items} items"
                )
        self.has_id[items] = parts.has_id
        if self.settings["categories"]:
            self.codes[items] = parts.codes
        for name, array in parts.content.items():
            content: Any = self.content[name]
            missing = array.isnan().any(dim=1)
            content.known[items] = ~missing
            content.values[items] = array.masked_fill(missing[:, None], 0.0)
            if not bool(content.values.isfinite().all()):
                raise InputError(f"items: content {shown(name)} holds an infinity")

    def tables(self) -> dict[str, int]:
        """Names of parameters and buffers with a row for each item -> the row of item 1."""
        names = ["weight", "has_id", *(["codes"] if self.settings["categories"] else [])]
        names += [f"content.{name}.{own}" for name in self.content for own in ("values", "known")]
        return dict.fromkeys(names, 1)

    def parts(self, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """x_k (.., D) of the parts of `rows` (..) int64, and which rows have them, (..) bool."""
        known = self.has_id[rows]
        if self.training and self.settings["id_dropout"]:
            known = known & (torch.rand(rows.shape) >= self.settings["id_dropout"]).to(rows.device)
        base = F.embedding(rows, self.weight, self.padding_idx) * known.unsqueeze(-1)
        if self.settings["categories"]:
            codes = self.codes[rows]
            own = self.category(codes)
            if len(self.settings["categories"]) > 1:
                own = own + self.level(self.levels[codes])
            there = codes > 0
            count = there.sum(dim=-1, keepdim=True)
            base = base + (own * there.unsqueeze(-1)).sum(dim=-2) / count.clamp(min=1)
            known = known | there.any(dim=-1)
        found, has = [base], [known]
        for content in self.contents():
            found.append(content(rows))
            has.append(content.known[rows])
        return found, has

    def contents(self) -> list[_Content]:
        """Return the kinds of content, in order."""
        return [cast(_Content, own) for own in self.content.values()]

    def forward(self, rows: Tensor) -> Tensor:
        """Return e (.., D) of `rows` (..) int64."""
        found, has = self.parts(rows)
        if not len(self.content):
            return found[0]
        x, known = torch.stack(found, dim=-2), torch.stack(has, dim=-1)
        scores = self.query(x).squeeze(-1) * self.embedding_dim**-0.5
        lowest = torch.finfo(scores.dtype).min
        shares = scores.masked_fill(~known, lowest).softmax(dim=-1) * known
        return (shares.unsqueeze(-1) * x).sum(dim=-2)


class _Content(nn.Module):
    """One kind of content: its values, which rows have some, and A f + a."""

    values: Tensor
    known: Tensor

    def __init__(self, rows: int, width: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(rows, width))
        self.register_buffer("known", torch.zeros(rows, dtype=torch.bool))
        self.project = nn.Linear(width, dim)

    def forward(self, rows: Tensor) -> Tensor:
        projected: Tensor = self.project(self.values[rows])
        return projected


def _settings_of(items: ItemParts | Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of parts, or those that a file holds; InputError for what is none."""
    settings = items.settings() if isinstance(items, ItemParts) else items
    if not isinstance(settings, Mapping) or settings.keys() != _SETTINGS:
        raise InputError(f"items: {shown(settings)} is neither ItemParts nor their settings")
    categories, content = settings["categories"], settings["content"]
    names = [name for level in categories for name in level] if _nested(categories) else [None]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise InputError("items: categories are not lists of different names, a list a level")
    if not isinstance(content, Mapping):
        raise InputError(f"items: content is {shown(content)}, not widths by name")
    for name, width in content.items():
        if not (isinstance(name, str) and name.isidentifier() and not hasattr(nn.ModuleDict, name)):
            raise InputError(f"items: content has the name {shown(name)}; take a word")
        check_count(f"items: the width of content {name}", width)
    if categories:
        check_count("items: most", settings["most"])
    check_unit("items: id_dropout", settings["id_dropout"], "[0, 1)")
    return {name: settings[name] for name in sorted(_SETTINGS)}


def _nested(levels: Any) -> bool:
    return isinstance(levels, list) and all(isinstance(level, list) and level for level in levels)


def item_settings(items: ItemParts | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what an encoder's `config` has of its parts: nothing of a plain table."""
    if items is None:
        return {}
    return {"items": _settings_of(items)}


def item_table(
    rows: int,
    num_items: int,
    dim: int,
    items: ItemParts | Mapping[str, Any] | None,
    padding_idx: int | None = 0,
) -> nn.Embedding:
    """Return the item table of an encoder: a plain one, or one made of parts."""
    if items is None:
        return nn.Embedding(rows, dim, padding_idx=padding_idx)
    return ItemEmbedding(rows, num_items, dim, items, padding_idx)
