"""A model of the members' kind with rows for the union of their catalogues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fisherkern.adapters import ModelAdapter
from fisherkern.adapters.libraries import PlainModule
from fisherkern.errors import InputError
from fisherkern.members.catalogue import CatalogueUnion
from fisherkern.members.ties import Tie, find_ties

# Attributes in which libraries keep how many rows a table has, or how many items there are.
_SIZES = (
    "num_embeddings",
    "out_features",
    "n_items",
    "num_items",
    "item_num",
    "item_count",
    "vocab_size",
    "_num_items",
)


def united_model(first: ModelAdapter, catalogue: CatalogueUnion, ties: Sequence[Tie]) -> Any:
    """Make a model like member 0 for the united catalogue; its values are to be written.

    Encoders of ours are built anew from their config. Of other models a copy gets longer tables.

    Raises:
        InputError: No such model can be made.
    """
    if type(first.library) is PlainModule and first.library.item_tables(first.module) is not None:
        number = len(catalogue.item_ids or ()) or catalogue.sizes[0]
        target = _rebuilt(first, {"num_items": number, **catalogue.config})
    else:
        target = _with_longer_tables(first, catalogue)
    if find_ties(target.module, "the model for the united catalogue") != list(ties):
        raise InputError(
            f"{type(first.module).__name__}(**config) does not build a model with the tensors "
            "and ties of the members, so their catalogues cannot be united"
        )
    return target


def _rebuilt(first: ModelAdapter, changes: Mapping[str, Any]) -> ModelAdapter:
    """Return a new module of the class, with the config of member 0 but for what changes."""
    module = first.module
    config = getattr(module, "config", None)
    if not isinstance(config, dict) or "num_items" not in config:
        raise InputError(
            f"the members' catalogues differ, and {type(module).__name__} has no config "
            "with num_items to build a model for their union from"
        )
    with torch.random.fork_rng(devices=[]):
        target: Any = type(module)(**{**config, **changes})
    target.train(module.training)
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    for name, parameter in target.named_parameters():
        parameter.requires_grad_(name not in frozen and parameter.requires_grad)
    return ModelAdapter.of(target)


def _with_longer_tables(first: ModelAdapter, catalogue: CatalogueUnion) -> ModelAdapter:
    """Return a copy of member 0 whose item tables have rows for the items of all members."""
    more = len(catalogue.item_ids or ()) - catalogue.sizes[0]
    target = first.copy()
    tables = dict(target.module.named_parameters(remove_duplicate=False))
    longer: dict[int, nn.Parameter] = {}
    lengths: set[int] = {catalogue.sizes[0]}
    for name in catalogue.parameters:
        table = tables[name]
        lengths.add(len(table))
        data = table.new_zeros(len(table) + more, *table.shape[1:])
        longer[id(table)] = nn.Parameter(data, requires_grad=table.requires_grad)
    for part in target.module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) in longer:
                part._parameters[name] = longer[id(parameter)]
        for holder in (part, getattr(part, "config", None)):
            for name in _SIZES:
                value = getattr(holder, name, None)
                if isinstance(value, int) and value in lengths:
                    _set(holder, name, value + more)
    return target


def _set(holder: Any, name: str, value: int) -> None:
    try:
        setattr(holder, name, value)
    except AttributeError:  # a property, computed from what is set elsewhere
        return
