"""Handlers of matrix products, lookups and what broadcasts over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.fisher.capture import Handlers, OpCall, ParamUse
from fisherkern.fisher.layers.grads import (
    BiasGrad,
    EmbeddingGrad,
    GainGrad,
    LinearGrad,
    MatmulGrad,
)

Described = Sequence[tuple[Tensor, ParamUse]]


def added(call: OpCall, tensor: Tensor | None, shape: Sequence[int] | None = None) -> Described:
    """The use of a summand laid out as `shape` (default: the parameter's), if it is a parameter."""
    view = call.view_of(tensor)
    if tensor is None or view is None:
        return []
    copies = call.copies(view.shape if shape is None else shape)
    return [] if copies is None else [(tensor, BiasGrad(view, copies))]


def scaled(
    call: OpCall, tensor: Tensor | None, inputs: Tensor, shape: Sequence[int] | None = None
) -> Described:
    """The same for a factor of `inputs`, which broadcast to the output."""
    view = call.view_of(tensor)
    if tensor is None or view is None:
        return []
    copies = call.copies(view.shape if shape is None else shape)
    if copies is None:
        return []
    return [(tensor, GainGrad(view, copies, call.first(inputs.expand(call.output.shape))))]


def handle_linear(call: OpCall) -> Described:
    def bound(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Described:
        if call.dim == call.output.dim() - 1:
            return []
        uses: list[tuple[Tensor, ParamUse]] = []
        if (view := call.view_of(weight)) is not None:
            uses.append((weight, LinearGrad(view, call.positions(input))))
        return [*uses, *added(call, bias)]

    return bound(*call.args, **call.kwargs)


def matmul(call: OpCall) -> Described:
    if len(call.args) != 2 or call.kwargs:
        return []
    input, weight = call.args
    if weight.dim() != 2 or call.dim == call.output.dim() - 1:
        return []
    inputs = call.positions(input)
    if (view := call.view_of(weight)) is not None:
        return [(weight, MatmulGrad(view, inputs))]
    if (view := call.view_or_transpose(weight)) is not None:
        return [(weight, LinearGrad(view, inputs))]
    return []


def addmm(call: OpCall) -> Described:
    """b + x W of plain factors."""
    if len(call.args) != 3 or call.kwargs:
        return []
    summand, input, weight = call.args
    product = OpCall((input, weight), {}, call.output, call.dim, call.capture)
    return [*matmul(product), *added(call, summand)]


def embedding(call: OpCall) -> Described:
    def bound(
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Described:
        view = call.view_of(weight)
        if view is None or max_norm is not None or scale_grad_by_freq or call.dim == input.dim():
            return []
        ids = call.positions(input, 0)
        if padding_idx is not None:
            ids = ids.masked_fill(ids == padding_idx % view.shape[0], -1)
        return [(weight, EmbeddingGrad(view, ids))]

    return bound(*call.args, **call.kwargs)


def indexed(call: OpCall) -> Described:
    """W[ids] of a matrix and integers."""
    table, ids = call.args
    view = call.view_of(table)
    if view is None or len(view.shape) != 2 or not isinstance(ids, Tensor):
        return []
    if ids.dtype not in (torch.int64, torch.int32) or call.dim == ids.dim():
        return []
    return [(table, EmbeddingGrad(view, call.positions(ids, 0) % view.shape[0]))]


def add(call: OpCall) -> Described:
    if call.kwargs.get("alpha", 1) != 1 or len(call.args) != 2:
        return []
    if shared := _shared_lookup(call):
        return shared
    return [use for tensor in call.args for use in added(call, tensor)]


def _shared_lookup(call: OpCall) -> Described:
    """SoftmaxStats looked up once and added to every sequence: a lookup by each of them."""
    for tensor in call.args:
        if id(tensor) in call.capture.shared_lookups:
            _, view, ids = call.capture.shared_lookups[id(tensor)]
            copies = call.copies(tensor.shape)
            rows = call.first(call.output).shape[1:]
            if copies is not None and rows == (len(ids), view.shape[1]):
                return [(tensor, EmbeddingGrad(view, ids.expand(call.output.shape[call.dim], -1)))]
    return []


def mul(call: OpCall) -> Described:
    if len(call.args) != 2 or call.kwargs:
        return []
    uses: list[tuple[Tensor, ParamUse]] = []
    for tensor, other in (call.args, call.args[::-1]):
        if isinstance(other, Tensor):
            uses += scaled(call, tensor, other)
    return uses


HANDLERS: Handlers = {
    F.linear: handle_linear,
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
