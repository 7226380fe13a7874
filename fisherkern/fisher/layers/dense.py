"""Handlers of matrix products, lookups and what broadcasts over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.fisher.forward.capture import Handlers, OpCall, ParamUse, Rewrite
from fisherkern.fisher.layers.einsum import einsum, inner
from fisherkern.fisher.layers.grads import (
    BagGrad,
    BiasGrad,
    ConvolutionGrad,
    EmbeddingGrad,
    GainGrad,
    LinearGrad,
    MatmulGrad,
)

Described = Sequence[tuple[Tensor, ParamUse]]


def added(call: OpCall, tensor: Tensor | None, shape: Sequence[int] | None = None) -> Described:
    """Return the use of a parameter that is a summand laid out as `shape` (default: its own)."""
    view = call.view_of(tensor)
    if tensor is None or view is None:
        return []
    copies = call.copies(view.shape if shape is None else shape)
    return [] if copies is None else [(tensor, BiasGrad(view, copies))]


def scaled(
    call: OpCall, tensor: Tensor | None, inputs: Tensor, shape: Sequence[int] | None = None
) -> Described:
    """Return the same for a factor of `inputs`, which broadcast to the output."""
    view = call.view_of(tensor)
    if tensor is None or view is None:
        return []
    copies = call.copies(view.shape if shape is None else shape)
    factor = call.broadcast(inputs)
    if copies is None or factor is None:
        return []
    return [(tensor, GainGrad(view, copies, factor.conj()))]


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
    if input.dim() == 2 and weight.dim() == 3 and call.dim == 0:
        # W x of every sequence: a Linear along its positions.
        view, columns = call.view_of(input), weight.detach().transpose(1, 2)
        return [] if view is None else [(input, ConvolutionGrad(view, columns))]
    if weight.dim() != 2 or input.dim() < 2 or call.dim == call.output.dim() - 1:
        return []
    if (view := call.transpose_of(weight)) is not None:
        return [(weight, LinearGrad(view, call.positions(input)))]
    if (view := call.view_of(weight)) is not None:
        return [(weight, MatmulGrad(view, call.positions(input)))]
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
        if view is None or scale_grad_by_freq or call.dim == input.dim():
            return []
        ids = call.positions(input, 0)
        if padding_idx is not None:
            ids = ids.masked_fill(ids == padding_idx % view.shape[0], -1)
        return [(weight, EmbeddingGrad(view, ids))]

    return bound(*call.args, **call.kwargs)


def embedding_bag(call: OpCall) -> Described:
    def bound(
        input: Tensor,
        weight: Tensor,
        offsets: Tensor | None = None,
        max_norm: float | None = None,
        norm_type: float = 2,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        per_sample_weights: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> Described:
        view = call.view_of(weight)
        if view is None or scale_grad_by_freq or mode not in ("sum", "mean"):
            return []
        ids, given = input, per_sample_weights
        if offsets is not None:
            ids, given = _padded(input, offsets, include_last_offset, given)
        if padding_idx is not None:
            ids = ids.masked_fill(ids == padding_idx % view.shape[0], -1)
        weights = (ids >= 0).to(call.output.dtype)
        if mode == "mean":
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)
        elif given is not None:
            weights = weights * given.detach()
        lead = call.output.shape[:-1]
        if call.dim == len(lead) or ids.shape[:-1].numel() != lead.numel():
            return []
        ids, weights = (call.positions(part.reshape(*lead, -1)) for part in (ids, weights))
        return [(weight, BagGrad(view, ids.flatten(1), weights))]

    return bound(*call.args, **call.kwargs)


def _padded(
    input: Tensor, offsets: Tensor, include_last: bool, given: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Bags (B, L) of flat ids and their weights, -1 where a bag is shorter."""
    starts = offsets[:-1] if include_last else offsets
    ends = torch.cat([starts[1:], offsets.new_tensor([len(input)])])
    if include_last:
        ends = offsets[1:]
    if not len(input):  # bags without anything in them, of which nothing is read
        input = input.new_zeros(1)
        given = None if given is None else given.new_zeros(1)
    place = torch.arange(int((ends - starts).max().clamp(min=1)), device=input.device)
    inside = place < (ends - starts)[:, None]
    at = (starts[:, None] + place).clamp(max=len(input) - 1)
    ids = input[at].masked_fill(~inside, -1)
    return ids, None if given is None else given[at]


def indexed(call: OpCall) -> Described:
    """W[ids] of integers."""
    table, ids = call.args
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        return []
    return _rows(call, table, ids)


def index_select(call: OpCall) -> Described:
    def bound(input: Tensor, dim: int, index: Tensor) -> Described:
        return _rows(call, input, index) if dim in (0, -input.dim()) else []

    return bound(*call.args, **call.kwargs)


def _rows(call: OpCall, table: Tensor, ids: Tensor) -> Described:
    view = call.view_of(table)
    if view is None or not view.shape or view.shape[0] == 0 or call.dim >= ids.dim():
        return []
    if len(view.shape) != 2:
        view = view.reshaped(view.shape[0], math.prod(view.shape[1:]))
    return [(table, EmbeddingGrad(view, call.positions(ids, 0) % view.shape[0]))]


def repeated(call: OpCall) -> Described:
    """Serve a tensor laid out once for every sequence: expand, repeat and their kin."""
    tensor = call.args[0]
    aligned = zip(tensor.shape[::-1], call.output.shape[::-1], strict=False)
    return added(call, tensor) if all(e in (1, all) for e, all in aligned) else []


def chosen(call: OpCall) -> Described:
    """torch.where(condition, input, other)."""
    if len(call.args) != 3 or call.kwargs:
        return []
    condition, input, other = call.args
    return _chosen(call, condition, input, other)


def chosen_method(call: OpCall) -> Described:
    """input.where(condition, other)."""
    if len(call.args) != 3 or call.kwargs:
        return []
    input, condition, other = call.args
    return _chosen(call, condition, input, other)


def _chosen(call: OpCall, condition: Tensor, input: Any, other: Any) -> Described:
    return [*scaled(call, input, condition), *scaled(call, other, ~condition)]


def assigned(call: OpCall) -> Described:
    """x[index] = row, of any index."""
    tensor, index, value = call.args
    view = call.view_of(value)
    if view is None or value.dim() > tensor.dim():
        return []
    number = torch.arange(value.numel(), device=tensor.device).view(value.shape)
    place = torch.full(tensor.shape, -1, device=tensor.device)
    place[index] = number
    try:
        expected = number.expand(tensor.shape)
    except RuntimeError:
        return []
    written = place >= 0
    if bool((written & (place != expected)).any()):
        return []
    return scaled(call, value, written)


def add(call: OpCall) -> Described:
    if call.kwargs.get("alpha", 1) != 1 or len(call.args) != 2:
        return []
    return [use for tensor in call.args for use in added(call, tensor)]


def sub(call: OpCall) -> Described:
    if call.kwargs.get("alpha", 1) != 1 or len(call.args) != 2:
        return []
    first, second = call.args
    return [*added(call, first), *scaled(call, second, -call.output.new_ones(()))]


def mul(call: OpCall) -> Described:
    if len(call.args) != 2 or call.kwargs:
        return []
    uses: list[tuple[Tensor, ParamUse]] = []
    for tensor, other in (call.args, call.args[::-1]):
        if isinstance(other, Tensor):
            uses += scaled(call, tensor, other)
    return uses


def div(call: OpCall) -> Described:
    """x / p, whose derivative by p is −(x / p) / p."""
    if len(call.args) != 2 or call.kwargs or not isinstance(call.args[1], Tensor):
        return []
    divisor = call.args[1]
    if call.view_of(divisor) is None:
        return []
    return scaled(call, divisor, -call.output / divisor.detach())


HANDLERS: Handlers = {
    F.linear: handle_linear,
    torch.addmm: addmm,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
    torch.mm: matmul,
    torch.Tensor.mm: matmul,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    torch.Tensor.__getitem__: indexed,
    torch.Tensor.__setitem__: assigned,
    torch.index_select: index_select,
    torch.Tensor.index_select: index_select,
    torch.Tensor.expand: repeated,
    torch.Tensor.expand_as: repeated,
    torch.broadcast_to: repeated,
    torch.Tensor.broadcast_to: repeated,
    torch.Tensor.repeat: repeated,
    torch.tile: repeated,
    torch.Tensor.tile: repeated,
    torch.where: chosen,
    torch.Tensor.where: chosen_method,
    torch.add: add,
    torch.Tensor.add: add,
    torch.Tensor.add_: add,
    torch.sub: sub,
    torch.Tensor.sub: sub,
    torch.Tensor.sub_: sub,
    torch.mul: mul,
    torch.Tensor.mul: mul,
    torch.div: div,
    torch.Tensor.div: div,
    torch.Tensor.__truediv__: div,
    torch.einsum: Rewrite(einsum),
    torch.inner: Rewrite(inner),
}
