"""A model's scores of a data set's items, whatever the model takes and whichever ids it has."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters import ModelAdapter
from fisherkern.data import SequenceDataset
from fisherkern.errors import InputError

log = logging.getLogger("fisherkern")

# Columns of a history for models that do not say how many they take.
_MAX_LEN = 50


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores of the items 1..V of a data set.

    Args:
        module: The bare module, None for a function.
        max_len: Columns of a history.
        first_item: The item of column 0, where the model counts items as the data does.
        num_items: V.
        ask: A batch of the data -> scores (N, V_out).
        columns: (V,) int64, the column of each item, where the model orders items by itself.
        tokens: (V + 1,) int64, the model's item of each of the data's; 0 stays 0.
    """

    module: nn.Module | None
    max_len: int
    first_item: int
    num_items: int
    ask: Callable[[Any], Any]
    columns: Tensor | None = None
    tokens: Tensor | None = None

    @classmethod
    def of(cls, model: Any, data: SequenceDataset) -> Scorer:
        """Make the scorer of a model, or of a function of batches.

        Raises:
            InputError: The model has other items than the data.
        """
        if not isinstance(model, (ModelAdapter, nn.Module)) and not callable(model):
            if isinstance(model, str):
                raise InputError(f"model: expected something to call, got {type(model).__name__}")
            return cls._of_adapter(ModelAdapter.of(model), data)
        if isinstance(model, (ModelAdapter, nn.Module)):
            return cls._of_adapter(ModelAdapter.of(model), data)
        own = getattr(model, "item_ids", None)
        if own is not None and list(own) != list(data.item_ids):
            raise _other_catalogue(len(own), data)
        return cls(
            module=None,
            max_len=int(getattr(model, "max_len", _MAX_LEN)),
            first_item=int(getattr(model, "first_item", 0)),
            num_items=data.num_items,
            ask=model,
        )

    @classmethod
    def _of_adapter(cls, adapter: ModelAdapter, data: SequenceDataset) -> Scorer:
        first = adapter.library.first_token(adapter.module)
        columns, tokens = _matched(adapter, data, first)
        offset = first - 1

        def ask(batch: dict[str, Tensor]) -> Tensor:
            items = batch["history"]
            if tokens is not None:
                items = tokens[items]
            beside = {name: value for name, value in batch.items() if name != "history"}
            native = adapter.make_batch(items, **beside)
            return adapter.logits(adapter.prepared(native))

        return cls(
            module=adapter.module,
            max_len=adapter.max_len or _MAX_LEN,
            first_item=adapter.first_item - offset,
            num_items=data.num_items,
            ask=ask,
            columns=columns,
            tokens=tokens,
        )

    def scores(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the scores of items 1..V for a batch, (N, V), other columns cut off.

        Raises:
            InputError: A wrong shape, or a NaN; the user is named.
        """
        found = self.ask(batch)
        rows, start = len(batch["history"]), 1 - self.first_item
        width = start + self.num_items
        if self.columns is not None:
            start, width = 0, int(self.columns.max()) + 1
        fits = isinstance(found, Tensor) and found.ndim == 2 and len(found) == rows
        if not fits or start < 0 or found.shape[1] < width:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"model: scores of shape {shape} with column 0 for item {self.first_item} "
                f"do not cover {rows} sequences and items 1 to {self.num_items}"
            )
        if self.columns is None:
            found = found[:, start:width]
        else:
            found = found[:, self.columns.to(found.device)]
        bad = torch.isnan(found).any(dim=1)
        if bad.any():
            user = int(batch["user"][bad.cpu()][0])
            raise InputError(f"model: a score of user number {user} is NaN")
        # Half-precision scores tie where the model's own do not.
        return found.to(torch.promote_types(found.dtype, torch.float32))


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
            f"{lacking[0]!r}; its own are like {own[0]!r}"
        )
    numbers = torch.tensor([place[str(item)] for item in ids])
    tokens = torch.cat([numbers.new_zeros(1), numbers + 1])
    return numbers + first - adapter.first_item, tokens


def _other_catalogue(number: int, data: SequenceDataset) -> InputError:
    return InputError(
        f"model: trained on another catalogue than {data.name} "
        f"({number} and {data.num_items} items, or another order)"
    )
