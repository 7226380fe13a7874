"""Calls of a model that are given other tensors in the places of its `DTensor`s."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fisherkern.errors import InputError


class Tables(Protocol):
    """The tables of a model and what stands in for its tensors; see `sharded.ShardedModel`."""

    @property
    def tables(self) -> Mapping[str, Any]: ...
    @property
    def values(self) -> Mapping[str, Tensor]: ...
    def name_of(self, tensor: Any) -> str | None: ...
    def substitute(self, tensor: Any) -> Any: ...
    def looked_up(self, name: str, ids: Tensor) -> Tensor: ...


class StandIns(TorchFunctionMode):
    """Gives calls what stands in for `DTensor`s, and looks up in the rows at hand."""

    def __init__(self, model: Tables) -> None:
        super().__init__()
        self.model = model

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Shape, device and dtype are the parameter's own.
        if getattr(func, "__name__", "") == "__get__" and _attribute(func) not in _VIEWS:
            return func(*args, **kwargs)
        lookup = _LOOKUPS.get(func)
        if lookup is not None:
            found = lookup(self.model, func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        substitute = self.model.substitute
        return func(*tree_map(substitute, tuple(args)), **tree_map(substitute, dict(kwargs)))


# Attributes of a tensor that are tensors with its entries.
_VIEWS = ("T", "mT", "H", "mH", "data")


def _attribute(func: Any) -> str:
    """Return the name of the attribute that a getter reads."""
    return str(getattr(getattr(func, "__self__", None), "__name__", ""))


def _embedding(
    model: Tables,
    func: Callable[..., Any],
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    name = model.name_of(weight)
    if name not in model.tables or name is None:
        return NotImplemented
    if max_norm is not None:
        raise InputError(f"model: '{name}' has max_norm, which a sharded table cannot serve")
    if padding_idx is not None:
        row = torch.tensor(padding_idx % weight.shape[0], device=input.device)
        padding_idx = int(model.looked_up(name, row))
    places = model.looked_up(name, input.long())
    return func(places, model.values[name], padding_idx, None, *args, **kwargs)


def _indexed(model: Tables, func: Callable[..., Any], table: Any, index: Any) -> Any:
    name = model.name_of(table)
    whole = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if name is None or name not in model.tables or not whole:
        return NotImplemented
    return func(model.values[name], model.looked_up(name, index.long()))


def _selected(model: Tables, func: Callable[..., Any], input: Any, dim: int, index: Tensor) -> Any:
    name = model.name_of(input)
    if name is None or name not in model.tables or dim not in (0, -input.dim()):
        return NotImplemented
    return func(model.values[name], 0, model.looked_up(name, index.long()))


_LOOKUPS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: _embedding,
    torch.Tensor.__getitem__: _indexed,
    torch.index_select: _selected,
    torch.Tensor.index_select: _selected,
}


class OnMeta(TorchFunctionMode):
    """Lets calls that a placeholder is part of give placeholders."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        if not any(isinstance(value, Tensor) and value.is_meta for value in given):
            return func(*args, **kwargs)

        def on_meta(value: Any) -> Any:
            return value.to("meta") if isinstance(value, Tensor) else value

        return func(*tree_map(on_meta, tuple(args)), **tree_map(on_meta, dict(kwargs)))
