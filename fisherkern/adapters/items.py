"""Which items a model has: their ids, and the tables with a row for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisherkern.adapters.files.item_ids import id_list
from fisherkern.adapters.output_layer import OutputLayerParts, part_of
from fisherkern.errors import InputError

# Fields under which RecBole's data sets keep the tokens of items.
_RECBOLE = ("iid_field", "field2id_token")
# Tokens beside the items that a table may have rows for: padding, a mask, unknown.
_BESIDE = 3


def ids_in(given: Any, first_token: int) -> list[Any]:
    """Return the external ids of items 1..V in what a user gave.

    Args:
        given: A list of ids item by item; or RecBole's data set, or RecTools' `IdMap` or data
            preparator, in which ids stand by token.
        first_token: The token of the first item.

    Raises:
        InputError: It is none of these, or an entry is no id.
    """
    if all(hasattr(given, name) for name in _RECBOLE):
        return list(given.field2id_token[given.iid_field])[1:]
    mapping = getattr(given, "item_id_map", given)
    if hasattr(mapping, "external_ids"):
        return list(mapping.external_ids)[first_token:]
    return id_list(given)


class _Lookups(TorchFunctionMode):
    """Notes which tables are looked up, and by which ids."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            ids = kwargs.get("input", args[0] if args else None)
            table = kwargs.get("weight", args[1] if len(args) > 1 else None)
            self.calls.append((table, ids.detach().clone()))
        elif func is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.int64:
            self.calls.append((args[0], args[1].detach().clone()))
        return func(*args, **kwargs)


def looked_up_tables(
    module: nn.Module, logits: Callable[[Any], Tensor], batches: Sequence[Any]
) -> set[str]:
    """Names of the parameters that two batches of other items look up at other rows.

    A table that is looked up whole counts as well: nothing but items is.
    """
    runs = []
    for batch in batches:
        watch = _Lookups()
        with torch.no_grad(), watch:
            logits(batch)
        runs.append(watch.calls)
    names = set()
    for (table, ids), (_, other) in zip(*runs, strict=False):
        part = part_of(module, table)
        if part is None:
            continue
        whole = ids.numel() == len(table) and torch.equal(
            ids.flatten().sort().values.cpu(), (torch.arange(len(table)))
        )
        if whole or not torch.equal(ids, other):
            names.add(part.name)
    return names


def output_tables(module: nn.Module, parts: OutputLayerParts, first_row: int) -> dict[str, int]:
    """Return the output layer's tensors, and the row of the first item in each.

    Args:
        module: The bare module.
        parts: Its output layer.
        first_row: The column of the first item.
    """
    found = {}
    for part in (parts.weight, parts.bias):
        if part is not None:
            width = part.shape[1] if len(part.shape) == 2 else 1
            found[part.name] = part.start // width + first_row
    return found


def tables_by_size(module: nn.Module, num_items: int, first_token: int) -> dict[str, int]:
    """Return the parameters with a row for each item, by their sizes alone.

    Raises:
        InputError: Another dimension of the model is as large, so that sizes do not tell.
    """
    embeddings = [part.weight for part in module.modules() if isinstance(part, nn.Embedding)]
    tables = [table for table in embeddings if 0 <= len(table) - num_items <= _BESIDE]
    sizes = {num_items} | {len(table) for table in tables}
    widths = {table.shape[1] for table in embeddings}
    if widths & sizes:
        raise InputError(
            f"model: its tables have {min(widths & sizes)} columns and as many rows, so item rows "
            "cannot be told from others; give the model a method item_parameters()"
        )
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() in (1, 2) and len(parameter) in sizes:
            found[name] = min(first_token, len(parameter) - num_items)
    return found
