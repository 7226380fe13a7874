"""A model's scores of a data set's items, whatever the model takes and whichever ids it has."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters import ModelAdapter
from fisherkern.adapters.agreement import EXAMPLE, NoLogitsError, check_function, distance
from fisherkern.adapters.batches import mapped
from fisherkern.adapters.sharded.models import is_sharded
from fisherkern.data import SequenceDataset
from fisherkern.errors import InputError, shown
from fisherkern.evaluation.scores import Scores, ScoringLayer, WholeScores, rounds
from fisherkern.evaluation.sharded_scores import ShardedScoringLayer

log = logging.getLogger("fisherkern")

# Columns of a history for models that do not say how many they take.
_MAX_LEN = 50

# How far the modules of a function are followed: a method's object, its list of models, these.
_LEVELS = 5

DataBatch = dict[str, Tensor]


def modules_of(function: Any) -> list[nn.Module]:
    """Return the modules that a function refers to: a method's, a partial's, a closure's."""
    found: dict[int, nn.Module] = {}
    level, seen = [function], set()
    for _ in range(_LEVELS):
        following: list[Any] = []
        for own in level:
            own = own.module if isinstance(own, ModelAdapter) else own
            if isinstance(own, nn.Module):
                found[id(own)] = own
            elif id(own) not in seen and not isinstance(own, type):
                following += _referred(own)
            seen.add(id(own))
        level = following
    return list(found.values())


def _referred(own: Any) -> list[Any]:
    """Return what a function, a container or an object refers to."""
    if isinstance(own, functools.partial):
        return [own.func, *own.args, *own.keywords.values()]
    if inspect.ismethod(own):
        return [own.__self__, own.__func__]
    if inspect.isfunction(own):
        try:
            names = inspect.getclosurevars(own)
        except ValueError:  # of a name that has no value yet
            return []
        return [*names.nonlocals.values(), *names.globals.values()]
    if isinstance(own, list | tuple | dict):
        return [*(own.values() if isinstance(own, dict) else own)]
    if inspect.ismodule(own) or isinstance(own, SequenceDataset):
        return []
    calls = vars(type(own)).get("__call__")
    return [*getattr(own, "__dict__", {}).values(), *([calls] if callable(calls) else [])]


def _copied(batch: Any) -> Any:
    """Return a batch with tensors of its own, for a model that writes to it."""
    return mapped(batch, lambda _, value: value.clone() if isinstance(value, Tensor) else value)


class Scorer:
    """Scores of the items 1..V of a data set.

    Attributes:
        module: The bare module, None for a function.
        modes: What runs in eval mode: the module, or those that a function refers to.
        max_len: Columns of a history.
    """

    def __init__(self, model: Any, data: SequenceDataset, max_scores: int) -> None:
        """Take a model, or a function of batches.

        Args:
            model: As `evaluate` takes it.
            data: The sequences.
            max_scores: Scores held at once, at most; one sequence's are always.

        Raises:
            InputError: The model has other items than the data.
        """
        self.num_items, self.max_scores = data.num_items, max_scores
        self.adapter: ModelAdapter | None = None
        self.module: nn.Module | None = None
        self.modes: nn.Module
        self._columns: Tensor | None = None  # (V,) int64, where the model orders items by itself
        self._layer: ScoringLayer | ShardedScoringLayer | None = None
        self._sought = self._checked = False
        self.sharded = False  # whether every process has a part of the items
        if isinstance(model, str):
            raise InputError(f"model: expected something to call, got {type(model).__name__}")
        if isinstance(model, ModelAdapter | nn.Module) or not callable(model):
            self._take_adapter(ModelAdapter.of(model), data)
            return
        own = getattr(model, "item_ids", None)
        if own is not None and list(own) != list(data.item_ids):
            raise _other_catalogue(len(own), data)
        self.max_len = int(getattr(model, "max_len", _MAX_LEN))
        self.first_item = int(getattr(model, "first_item", 0))
        self.modes = nn.ModuleList(modules_of(model))
        self._native: Callable[[DataBatch], Any] = _copied
        self._logits: Callable[[Any], Any] = model

    def _take_adapter(self, adapter: ModelAdapter, data: SequenceDataset) -> None:
        first = adapter.library.first_token(adapter.module)
        self._columns, tokens = _matched(adapter, data, first)

        def native(batch: DataBatch) -> Any:
            beside = _copied(batch)
            items = beside.pop("history")
            items = items if tokens is None else tokens[items]
            return adapter.prepared(adapter.make_batch(items, **beside))

        self.adapter, self.module = adapter, adapter.module
        self.modes = adapter.module
        self.max_len = adapter.max_len or _MAX_LEN
        # The item of column 0, where the model counts items as the data does.
        self.first_item = adapter.first_item - (first - 1)
        self._native, self._logits = native, adapter.logits
        self.sharded = is_sharded(adapter.module)
        if self.sharded:
            # No process has the logits that would be sought and checked.
            self._layer, self._sought, self._checked = ShardedScoringLayer(adapter), True, True

    def parts(self, batch: DataBatch) -> Iterator[DataBatch]:
        """Yield a batch of the data in parts, one where the scores fit or are made by tiles.

        Warns of a module whose scores are not the same twice, or without other sequences.
        """
        if self.adapter is not None and not self._checked:
            self._checked = True
            few = {name: value[:EXAMPLE] for name, value in batch.items()}
            logits = self.adapter.all_logits
            # It is asked three times.
            copying = dataclasses.replace(self.adapter, all_logits=lambda own: logits(_copied(own)))
            try:
                self._say_of_mask(check_function(copying, self._native(few)).shape[1])
            except NoLogitsError:
                raise
            except InputError as error:
                log.warning("the ranks are of this batch size and run alone: %s", error)
        elif not self._checked:
            self._checked = True
            few = {name: value[:EXAMPLE] for name, value in batch.items()}
            one, two = (self._logits(self._native(few)) for _ in range(2))
            same = isinstance(one, Tensor) and isinstance(two, Tensor) and one.shape == two.shape
            if same and (gap := distance(one, two)) is not None:
                log.warning(
                    "the ranks are of this run alone: scores of one batch are %s apart", gap
                )
        rows = len(batch["history"])
        most = max(1, self.max_scores // self.num_items)
        if rows > most or (self.adapter is not None and rounds(self.adapter)):
            self._seek(batch)
        if self._layer is not None:
            most = rows
        for first in range(0, rows, most):
            yield {name: value[first : first + most] for name, value in batch.items()}

    def _say_of_mask(self, columns: int) -> None:
        """Warn of a module that reads an id more than it scores: a mask that no history ends in."""
        assert self.adapter is not None
        asked = self.adapter.given.keys() & {"make_batch", "logits", "encode"}
        if asked or self.adapter.library.name != "plain module" or self.adapter.encode is not None:
            return
        tables = [part for part in self.adapter.module.modules() if isinstance(part, nn.Embedding)]
        rows = [part.num_embeddings for part in tables if part.padding_idx is not None]
        if 0 < max(rows, default=0) - columns - self.first_item <= 2:
            log.warning(
                "the model reads %d ids and scores %d: if the last is a mask, give "
                "fk.adapt(model, make_batch=...) that puts it at the end",
                max(rows),
                columns,
            )

    def scores(self, batch: DataBatch) -> Scores:
        """Return the scores of one of the `parts`.

        Raises:
            InputError: The model's have a wrong shape.
            NaNScoreError: A score is NaN.
        """
        native = self._native(batch)
        if self._layer is None:
            found = self._logits(native)
            self._check_shape(found, len(batch["history"]))
            if self.adapter is not None and rounds(self.adapter, found):
                self._seek(batch)
            if self._layer is None:
                found = found[:, self._places(found.device)]
                # Scores of fewer digits tie where the model's own do not.
                least = torch.float32 if found.is_floating_point() else torch.float64
                return WholeScores(found.to(torch.promote_types(found.dtype, least)))
        columns = self._columns if self._columns is not None else 1 - self.first_item
        found = self._layer.scores(native, columns, self.num_items, self.max_scores)
        if isinstance(self._layer, ShardedScoringLayer):
            self._check_columns(self._layer.num_columns, len(batch["history"]))
        return found

    def _seek(self, batch: DataBatch) -> None:
        """Look for the output layer, once, on a batch of the data."""
        if self._sought or self.adapter is None:
            return
        self._sought = True
        few = {name: value[:EXAMPLE] for name, value in batch.items()}
        layer = ScoringLayer.of(self.adapter, self._native(few))
        if layer is not None:
            self._check_shape(layer.head()[0].T, layer.head()[0].shape[1])
        self._layer = layer

    def _places(self, device: torch.device) -> slice | Tensor:
        """Return the columns of items 1..V."""
        if self._columns is not None:
            return self._columns.to(device)
        return slice(1 - self.first_item, 1 - self.first_item + self.num_items)

    def _check_columns(self, columns: int, rows: int) -> None:
        """Check the shape of scores that are not made."""
        self._check_shape(torch.empty(rows, columns, device="meta"), rows)

    def _check_shape(self, found: Any, rows: int) -> None:
        start = 1 - self.first_item
        width = start + self.num_items
        if self._columns is not None:
            start, width = 0, int(self._columns.max()) + 1
        fits = isinstance(found, Tensor) and found.ndim == 2 and len(found) == rows
        if fits and (found.is_complex() or found.layout != torch.strided):
            kind = "complex" if found.is_complex() else "no dense tensor"
            raise InputError(f"model: its scores are {kind}")
        if not fits or start < 0 or found.shape[1] < width:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"model: scores of shape {shape} with column 0 for item {self.first_item} "
                f"do not cover {rows} sequences and items 1 to {self.num_items}"
            )


def _matched(
    adapter: ModelAdapter, data: SequenceDataset, first: int
) -> tuple[Tensor | None, Tensor | None]:
    """(Column of each item, the model's item of each of the data's); None where they are alike."""
    own = adapter.item_ids
    if own is None:
        if adapter.library.name != "plain module":
            log.warning(
                "%s: the model lists no item ids, so item i of %s is taken to be its i-th item",
                adapter.library.name,
                data.name,
            )
        return None, None
    ids = list(data.item_ids)
    if own == ids:
        return None, None
    if adapter.library.name == "plain module" and "item_ids" not in adapter.given:
        raise _other_catalogue(len(own), data)
    place = {str(item): number for number, item in enumerate(own)}
    lacking = [item for item in ids if str(item) not in place]
    if lacking:
        raise InputError(
            f"model: it lacks {len(lacking)} of the {len(ids)} items of {data.name}, such as "
            f"{lacking[0]!r}; its own are like {shown(own[0])}"
        )
    numbers = torch.tensor([place[str(item)] for item in ids])
    tokens = torch.cat([numbers.new_zeros(1), numbers + 1])
    return numbers + first - adapter.first_item, tokens


def _other_catalogue(number: int, data: SequenceDataset) -> InputError:
    return InputError(
        f"model: trained on another catalogue than {data.name} "
        f"({number} and {data.num_items} items, or another order)"
    )
