"""Rules of matrix products, lookups and what broadcasts over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.fisher.capture import Call, Rules, Use
from fisherkern.fisher.rules.uses import (
    Added,
    LinearWeight,
    Lookup,
    MatrixWeight,
    Scaled,
    by_position,
)

Described = Sequence[tuple[Tensor, Use]]


def added(call: Call, tensor: Tensor | None, shape: Sequence[int] | None = None) -> Described:
    """The use of a summand laid out as `shape` (its own by default), if it is a parameter."""
    place = call.place(tensor)
    if tensor is None or place is None:
        return []
    copies = call.copies(place.shape if shape is None else shape)
    return [] if copies is None else [(tensor, Added(place, copies))]


def scaled(
    call: Call, tensor: Tensor | None, inputs: Tensor, shape: Sequence[int] | None = None
) -> Described:
    """The same for a factor of `inputs`, which broadcast to the output."""
    place = call.place(tensor)
    if tensor is None or place is None:
        return []
    copies = call.copies(place.shape if shape is None else shape)
    if copies is None:
        return []
    return [(tensor, Scaled(place, copies, call.first(inputs.expand(call.output.shape))))]


def linear(call: Call) -> Described:
    def bound(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Described:
        if call.dim == call.output.dim() - 1:
            return []
        found: list[tuple[Tensor, Use]] = []
        if (place := call.place(weight)) is not None:
            found.append((weight, LinearWeight(place, by_position(call.first(input), 1))))
        return [*found, *added(call, bias)]

    return bound(*call.args, **call.kwargs)


def matmul(call: Call) -> Described:
    if len(call.args) != 2 or call.kwargs:
        return []
    input, weight = call.args
    if weight.dim() != 2 or call.dim == call.output.dim() - 1:
        return []
    inputs = by_position(call.first(input), 1)
    if (place := call.place(weight)) is not None:
        return [(weight, MatrixWeight(place, inputs))]
    if (place := call.either_place(weight)) is not None:
        return [(weight, LinearWeight(place, inputs))]
    return []


def addmm(call: Call) -> Described:
    """b + x W of plain factors."""
    if len(call.args) != 3 or call.kwargs:
        return []
    summand, input, weight = call.args
    product = Call((input, weight), {}, call.output, call.dim, call.capture)
    return [*matmul(product), *added(call, summand)]


def embedding(call: Call) -> Described:
    def bound(
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Described:
        place = call.place(weight)
        if place is None or max_norm is not None or scale_grad_by_freq or call.dim == input.dim():
            return []
        ids = by_position(call.first(input), 0)
        if padding_idx is not None:
            ids = ids.masked_fill(ids == padding_idx % place.shape[0], -1)
        return [(weight, Lookup(place, ids))]

    return bound(*call.args, **call.kwargs)


def indexed(call: Call) -> Described:
    """W[ids] of a matrix and integers."""
    table, ids = call.args
    place = call.place(table)
    if place is None or len(place.shape) != 2 or not isinstance(ids, Tensor):
        return []
    if ids.dtype not in (torch.int64, torch.int32) or call.dim == ids.dim():
        return []
    return [(table, Lookup(place, by_position(call.first(ids) % place.shape[0], 0)))]


def add(call: Call) -> Described:
    if call.kwargs.get("alpha", 1) != 1 or len(call.args) != 2:
        return []
    if shared := _shared_lookup(call):
        return shared
    return [use for tensor in call.args for use in added(call, tensor)]


def _shared_lookup(call: Call) -> Described:
    """Rows looked up once and added to every sequence: a lookup by each of them."""
    for tensor in call.args:
        if id(tensor) in call.capture.shared_lookups:
            _, place, ids = call.capture.shared_lookups[id(tensor)]
            copies = call.copies(tensor.shape)
            rows = call.first(call.output).shape[1:]
            if copies is not None and rows == (len(ids), place.shape[1]):
                return [(tensor, Lookup(place, ids.expand(call.num_sequences, -1)))]
    return []


def mul(call: Call) -> Described:
    if len(call.args) != 2 or call.kwargs:
        return []
    found: list[tuple[Tensor, Use]] = []
    for tensor, other in (call.args, call.args[::-1]):
        if isinstance(other, Tensor):
            found += scaled(call, tensor, other)
    return found


RULES: Rules = {
    F.linear: linear,
    torch.addmm: addmm,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
    F.embedding: embedding,
    torch.Tensor.__getitem__: indexed,
    torch.add: add,
    torch.Tensor.add: add,
    torch.Tensor.add_: add,
    torch.mul: mul,
    torch.Tensor.mul: mul,
}
