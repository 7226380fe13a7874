"""What native checkpoints say of their networks: settings, item ids and vocabularies."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherkern.adapters import Checkpoint
from fisherkern.adapters.files.checkpoints import read_json_object
from fisherkern.adapters.files.pickles import Pairs, Stub
from fisherkern.errors import InputError, shown
from fisherkern.members.catalogue import CatalogueUnion, positions_of, union_item_ids
from fisherkern.members.configs import differing_setting, function_settings
from fisherkern.merging.files.tensor_files import TensorFile

log = logging.getLogger("fisherkern")

# Rows of an item table that may be no item's: padding and mask.
EXTRA_ROWS = 2
# What low-rank factors are scaled by is folded in where they are merged; where they are the
# tensors' names say, and these lists were sets, in any order.
NOT_COMPARED = (
    *("lora_alpha", "r", "alpha_pattern", "rank_pattern", "use_rslora"),
    *("target_modules", "modules_to_save", "exclude_modules", "task_type"),
)
# Kinds that are tensors by name and nothing else, and may be written in other shapes.
GROWING = ("safetensors", "state dict")
# RecTools lists these rows among its items.
SPECIAL = frozenset(("'PAD'", "'MASK'"))
# A language model's tokens, by which the rows of its tables are known.
VOCABULARIES = ("tokenizer.json", "vocab.json")


def check_native_settings(files: Sequence[TensorFile]) -> None:
    """Check that settings agree that change the function.

    Raises:
        InputError: Two differ; the message names the files, the setting and both values.
    """
    settings = [_settings(file.checkpoint) for file in files if file.checkpoint is not None]
    for number, own in enumerate(settings):
        odd = differing_setting(settings[0], own)
        if odd is not None:
            key, one, two = odd
            raise InputError(
                f"{files[number].path}: was built with {key}={shown(two)}, and "
                f"{files[0].path} with "
                f"{key}={shown(one)}"
            )


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.config is not None:
        skipped = NOT_COMPARED if checkpoint.kind == "peft" else ()
        known = function_settings(checkpoint.config)
        return {key: v for key, v in known.items() if key.partition(".")[0] not in skipped}
    for key in ("hyper_parameters", "config"):
        value = checkpoint.extras.get(key)
        if isinstance(value, Stub) and isinstance(value.state, Pairs):
            inner = value.state.texts().get("final_config_dict")  # RecBole's
            value = inner if isinstance(inner, Pairs) else value.state
        if isinstance(value, Pairs):
            return function_settings(_plain(value), of_trainer=True)
    return {}


def _plain(value: Pairs, depth: int = 0) -> dict[str, Any]:
    """Return the numbers, words and switches of a dictionary in a file, nested ones three deep."""
    found: dict[str, Any] = {}
    for key, entry in value.texts().items():
        if isinstance(entry, Pairs) and depth < 3:
            found[key] = _plain(entry, depth + 1)
        elif type(entry) in (int, float, str, bool):
            found[key] = entry
    return found


class ItemIds:
    """A checkpoint's item ids, in the order of its item rows, and the row of the first."""

    def __init__(self, ids: Sequence[Any], first_item: int | None) -> None:
        self.ids, self.first_item = list(ids), first_item
        # Told apart by type as well: 10, 10.0 and "10" are three ids.
        self.keys = [repr(own) for own in self.ids]

    @staticmethod
    def of(file: TensorFile) -> ItemIds | None:
        """Those in the checkpoint, or in the JSON file beside it; None where there are none."""
        checkpoint = file.checkpoint
        if checkpoint is None:
            return None
        if checkpoint.item_ids is not None:
            return ItemIds(checkpoint.item_ids, 0)
        beside = ids_file(file.path)
        content = read_json_object(beside) if beside.is_file() else {}
        if "item_ids" not in content:
            return None
        ids, first = content["item_ids"], content.get("first_item")
        if not isinstance(ids, list) or any(isinstance(own, list | dict) for own in ids):
            raise InputError(f"{beside}: its item_ids are not a list of ids")
        if first is not None and (type(first) is not int or not 0 <= first <= EXTRA_ROWS):
            raise InputError(f"{beside}: its first_item is {shown(first)}, no row of a first item")
        return ItemIds(ids, first)


def ids_file(path: Path) -> Path:
    """Where item ids stand beside a checkpoint: a.json beside a.pth, item_ids.json in a folder."""
    return path / "item_ids.json" if path.is_dir() else path.with_suffix(".json")


@dataclass(frozen=True)
class MatchedItems:
    """The members' united catalogue, and the base's.

    beside: what is written as item ids beside the result, None where there is nothing.
    """

    catalogue: CatalogueUnion
    base: CatalogueUnion | None = None
    beside: dict[str, Any] | None = None


def match_item_rows(files: Sequence[TensorFile], base: TensorFile | None) -> MatchedItems:
    """Match item rows by the item ids that checkpoints carry, or the JSON file beside them.

    Raises:
        InputError: Only some have ids; two share no item; the first lacks an item and is of a kind
            that cannot grow; or the item rows cannot be told from others.
    """
    everything = [*files, *([] if base is None else [base])]
    found = [ItemIds.of(file) for file in everything]
    known = [own for own in found if own is not None]
    if not known:
        adapters = all(f.checkpoint is not None and f.checkpoint.kind == "peft" for f in files)
        if not (_same_vocabulary(everything) or adapters or len(files) == 1):
            log.warning("no member has item ids: row i is taken to be the same item in all members")
        return MatchedItems(CatalogueUnion(None, None, [0] * len(files), {}))
    if len(known) < len(found):
        lacking = everything[found.index(None)].path
        having = everything[next(n for n, own in enumerate(found) if own is not None)].path
        raise InputError(
            f"{lacking}: has no item ids, so its item rows cannot be matched with those of "
            f"{having}; put them as item_ids into {ids_file(lacking)}"
        )
    members = known[: len(files)]
    for file, own in zip(everything, known, strict=True):
        if len(set(own.keys)) < len(own.keys):
            positions_of([], own.keys, str(file.path))
    if all(own.keys == known[0].keys for own in known):
        ids = [str(own) for own in known[0].ids]
        same = CatalogueUnion(ids, None, [len(ids)] * len(files), {})
        return MatchedItems(same, None, _beside(files[0], known, known[0].ids))
    _check_overlap(files, members)
    union, positions = union_item_ids(
        (str(file.path), own.keys) for file, own in zip(files, members, strict=True)
    )
    kind = files[0].checkpoint.kind if files[0].checkpoint is not None else ""
    if len(union) > len(members[0].keys) and kind not in GROWING:
        raise InputError(
            f"{files[0].path}: lacks the item {union[len(members[0].keys)]}, which another member "
            f"has, and a {kind} file cannot grow: name the member with all items first, or unite "
            "the catalogues in memory by merge"
        )
    sizes = [len(own.keys) for own in known]
    tables = _item_tables(everything, known)
    values = {key: own for one in members for key, own in zip(one.keys, one.ids, strict=True)}
    beside = _beside(files[0], known, [values[key] for key in union])
    united = CatalogueUnion(union, positions, sizes[: len(files)], tables)
    if base is None:
        return MatchedItems(united, None, beside)
    in_base = positions_of(union, known[-1].keys, str(base.path))
    of_base = CatalogueUnion(union, [in_base], sizes[-1:], tables)
    return MatchedItems(united, of_base, beside)


def _beside(
    first: TensorFile, known: Sequence[ItemIds], ids: Sequence[Any]
) -> dict[str, Any] | None:
    """Return the ids in the form they had beside the first member; None if it had none."""
    if first.checkpoint is None or first.checkpoint.item_ids is not None:
        return None
    start = known[0].first_item
    return {"item_ids": list(ids)} | ({} if start is None else {"first_item": start})


def _check_overlap(files: Sequence[TensorFile], members: Sequence[ItemIds]) -> None:
    first = set(members[0].keys) - SPECIAL
    for file, own in zip(files, members, strict=True):
        keys = [key for key in own.keys if key not in SPECIAL]
        if keys and first and first.isdisjoint(keys):
            example = next(key for key in members[0].keys if key in first)
            raise InputError(
                f"{file.path}: has no item of {files[0].path}: its first is {keys[0]}, and there "
                f"{example}"
            )


def _same_vocabulary(files: Sequence[TensorFile]) -> bool:
    """Whether every folder has a tokenizer, and all the same tokens; refuses others."""
    found: list[Mapping[str, Any]] = []
    for file in files:
        path = next((file.path / own for own in VOCABULARIES if (file.path / own).is_file()), None)
        if path is None:
            return False
        content = read_json_object(path)
        model = content.get("model")
        tokens = model.get("vocab") if isinstance(model, dict) else content
        if not tokens:
            return False
        found.append({"tokens": tokens})
        if found[-1] != found[0]:
            raise InputError(f"{path}: has other tokens than that of {files[0].path}")
    return True


def _item_tables(files: Sequence[TensorFile], known: Sequence[ItemIds]) -> dict[str, int]:
    """Tensor -> row of its first item, for the tensors that have a row per item.

    Raises:
        InputError: None has, or they cannot be told from others for certain.
    """
    sizes = [len(own.keys) for own in known]
    tables: dict[str, int] = {}
    for name, (_, shape) in files[0].layout.items():
        shapes = [file.layout[name][1] for file in files if name in file.layout]
        if len(shapes) < len(files) or any(len(own) != len(shape) for own in shapes):
            continue  # which is refused elsewhere
        for dim in range(len(shape)):
            extra = {own[dim] - size for own, size in zip(shapes, sizes, strict=True)}
            if len(extra) > 1 or not 0 <= min(extra) <= EXTRA_ROWS:
                continue
            if dim or "pos" in name.lower():
                raise InputError(
                    f"{files[0].path}: tensor {name!r} has as many rows or columns as there are "
                    "items, so item rows cannot be told from others"
                )
            tables[name] = _first_item(files, known, name, extra.pop())
    if not tables:
        raise InputError(f"{files[0].path}: no tensor has a row for each of its {sizes[0]} items")
    return tables


def _first_item(files: Sequence[TensorFile], known: Sequence[ItemIds], name: str, more: int) -> int:
    """Return the row of the first item of a table with `more` rows than items."""
    if more == 0:
        return 0
    given = {own.first_item for own in known} - {None}
    if len(given) == 1 and (first := given.pop()) is not None and first <= more:
        return first
    if not given and all(bool((file.rows(name, 0, 1) == 0).all()) for file in files):
        return 1  # a row of zeros is padding's
    raise InputError(
        f"{files[0].path}: tensor {name!r} has {more} rows more than there are items, and which "
        f"is the first item's is not known: put it as first_item into {ids_file(files[0].path)}"
    )
