"""The output layer of a model whose item table has its rows over the processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.adapters.batches import batch_size, batch_slice
from fisherkern.adapters.output_layer import find_output_layer
from fisherkern.adapters.sharded.models import ShardedModel
from fisherkern.adapters.sharded.stand_ins import OnMeta
from fisherkern.errors import InputError
from fisherkern.processes import together

CANNOT = "which a sharded table cannot serve"


def seen_by(shards: ShardedModel, model: ModelAdapter) -> ModelAdapter:
    """Return an adapter whose functions see what stands in for the model's `DTensor`s."""
    hidden, head = model.all_hidden, model.head
    return dataclasses.replace(
        model,
        all_logits=shards.wrapped(model.all_logits),
        all_hidden=None if hidden is None else shards.wrapped(hidden),
        head=None if head is None else shards.wrapped(head),
    )


def with_sharded_layer(shards: ShardedModel, model: ModelAdapter, batch: Any) -> ModelAdapter:
    """Return an adapter with the output layer that it has, or that a forward pass of a batch shows.

    Raises:
        InputError: The logits are no linear map's output, or its rows are computed.
    """
    shards.fetch_for(batch, None)
    if model.all_hidden is not None and model.head is not None:
        return model
    source: Any = shards
    few = batch_slice(batch, 0, min(2, batch_size(batch)))
    with together(), OnMeta():
        parts = find_output_layer(shards.wrapped(model.all_logits), source, few)
        if not isinstance(parts, str) and (parts.fixed_rows, parts.row_scaling) != (None, None):
            parts = "the rows of its output layer are computed"
        if isinstance(parts, str):
            raise InputError(f"model: {parts}, {CANNOT}")
    found = parts
    head: Callable[[], tuple[Tensor, Tensor | None]] = lambda: found.head(source)  # noqa: E731
    return dataclasses.replace(model, all_hidden=found.encoder(model.all_logits), head=head)


@dataclasses.dataclass(frozen=True)
class OwnItems:
    """The items that this process has: their numbers, vectors (n, D) and biases (n,) or None.

    bias_table: the table of which the biases are rows, and the row of item 0; None where every
    process has all biases.
    """

    numbers: range
    weight: Tensor
    bias: Tensor | None
    bias_table: tuple[str, int] | None

    @staticmethod
    def of(shards: ShardedModel, model: ModelAdapter) -> OwnItems:
        """Those of the output layer of an adapter."""
        assert model.head is not None
        head = shards.head(model.head)
        table = shards.tables[head.table]
        first = max(table.first - head.first, 0)
        stop = min(table.first + len(table.rows) - head.first, head.num_items)
        numbers = range(first, max(first, stop))
        start = head.first + numbers.start - table.first
        weight = table.rows[max(start, 0) :][: len(numbers)]
        if head.bias is None:
            return OwnItems(numbers, weight, None, None)
        part = shards.part_of_table(head.bias)
        if part is None:
            bias = head.bias.detach()[numbers.start : numbers.stop]
            return OwnItems(numbers, weight, bias, None)
        name, row = part
        bias = shards.tables[name].between(row + numbers.start, row + numbers.stop)
        return OwnItems(numbers, weight, bias, part)
