"""Kinds of use: what a call's output gradient says about one parameter, per sequence.

Everywhere N sequences first, then any positions, flattened to T; a gradient delta has the R
probes before them. `joined` makes one use of several of the same kind and parameter, for output
gradients put side by side along the positions, each as `positions` gives it: a weight used at
every step of a recurrence is one product over all steps, and its per-sequence gradients are
never stored.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from fisherkern import ops
from fisherkern.adapters.parameters import ParamView
from fisherkern.fisher.forward.slices import Slice


@runtime_checkable
class Joinable(Protocol):
    """A use of which several make one; see above."""

    def positions(self, delta: Tensor) -> Tensor:
        """Return the part of `delta` that `joined` wants side by side, (R, N, T, ...)."""

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        """See `ParamUse`; also takes what `positions` gives."""

    @staticmethod
    def joined(uses: Sequence[Any]) -> Joinable:
        """Return the use of all positions of several uses of the same kind and parameter."""


@runtime_checkable
class Sliceable(Protocol):
    """A use that also serves the gradients of a slice of its output."""

    def sliced_to(self, part: Slice, extent: int) -> Any:
        """Return the use for delta that is `part` of (N, ...) with `extent` entries, or None."""


def by_position(tensor: Tensor, trailing: int, leading: int = 1) -> Tensor:
    """(N, ..., *last) -> (N, T, *last), `leading` first and `trailing` last dimensions kept."""
    kept = tensor.shape[tensor.dim() - trailing :]
    return tensor.reshape(*tensor.shape[:leading], -1, *kept)


def channels_last(delta: Tensor) -> Tensor:
    """(R, N, C, ...) -> (R, N, T, C)."""
    return delta.flatten(3).transpose(2, 3) if delta.dim() > 3 else delta[:, :, None]


def widened(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of one dtype, fp32 or wider: autocast gives delta another."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


@dataclasses.dataclass
class LinearGrad:
    """W of y = x Wᵀ + b: g_n = Σ_t δ_nt x_ntᵀ."""

    _positions: ClassVar[int] = 1  # their dimension in delta (N, T, O)

    param: ParamView
    inputs: Tensor  # (N, T, I)

    def sliced_to(self, part: Slice, extent: int) -> LinearGrad | None:
        if part.dim != self._positions or self.inputs.shape[1] != extent:
            return None
        return dataclasses.replace(self, inputs=part.of(self.inputs, 1))

    def positions(self, delta: Tensor) -> Tensor:
        return by_position(delta, 1, leading=2)

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        ops.segment_outer_square_(fisher, self.positions(delta), self.inputs)

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        positions, inputs = widened(self.positions(delta[None, part])[0], self.inputs[part])
        return torch.bmm(positions.transpose(1, 2), inputs)

    @staticmethod
    def joined(uses: Sequence[LinearGrad]) -> LinearGrad:
        return LinearGrad(uses[0].param, torch.cat([use.inputs for use in uses], dim=1))


@dataclasses.dataclass
class ConvolutionGrad(LinearGrad):
    """The weight, (O, C·k), of a convolution: a Linear's on the unfolded input, (N, L, C·k)."""

    _positions: ClassVar[int] = 2  # of (N, O, L)

    def positions(self, delta: Tensor) -> Tensor:
        return channels_last(delta)

    @staticmethod
    def joined(uses: Sequence[LinearGrad]) -> LinearGrad:
        # The same as a Linear's once `positions` has put the channels last.
        return LinearGrad.joined(uses)


@dataclasses.dataclass
class GroupedConvolutionGrad:
    """The weight, (O, (C/G)·k), of a convolution in G groups, each a Linear on its channels."""

    param: ParamView
    inputs: Tensor  # (N, L, G, (C/G)·k)

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        for gradient in delta:
            fisher += self.per_sequence(gradient, slice(None)).square_().sum(dim=0)

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        by_channel, inputs = widened(channels_last(delta[None, part])[0], self.inputs[part])
        by_group = by_channel.unflatten(2, (inputs.shape[2], -1))
        g = torch.einsum("nlgo,nlgi->ngoi", by_group, inputs)
        return g.reshape(len(g), *self.param.shape)


@dataclasses.dataclass
class MatmulGrad:
    """W of y = x W, (I, O): g_n = Σ_t x_nt δ_ntᵀ."""

    param: ParamView
    inputs: Tensor  # (N, T, I)

    def positions(self, delta: Tensor) -> Tensor:
        return by_position(delta, 1, leading=2)

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        squares = fisher.new_zeros(fisher.shape[::-1])
        ops.segment_outer_square_(squares, self.positions(delta), self.inputs)
        fisher += squares.t()

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        inputs, positions = widened(self.inputs[part], by_position(delta[part], 1))
        return torch.bmm(inputs.transpose(1, 2), positions)

    @staticmethod
    def joined(uses: Sequence[MatmulGrad]) -> MatmulGrad:
        return MatmulGrad(uses[0].param, torch.cat([use.inputs for use in uses], dim=1))


@dataclasses.dataclass
class BiasGrad:
    """A summand that broadcasts (bias, learned positions): g_n is δ_n summed over the copies."""

    takes_complex: ClassVar[bool] = True

    param: ParamView
    copies: tuple[int, ...]  # the dimensions of (N, ...) over which the parameter is repeated

    def sliced_to(self, part: Slice, extent: int) -> BiasGrad | None:
        return self if part.dim in self.copies else None

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        fisher += self._summed(delta.flatten(0, 1)).square().sum(dim=0)

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        return self._summed(delta[part])

    def _summed(self, delta: Tensor) -> Tensor:
        (wide,) = widened(delta)
        g = wide.sum(dim=self.copies) if self.copies else wide
        return g.reshape(len(g), *self.param.shape)


@dataclasses.dataclass
class GainGrad(BiasGrad):
    """A factor that broadcasts (gain of a norm): g_n is δ_n ∘ x̄_n summed over the copies."""

    inputs: Tensor  # (N, ...), the conjugate of the other factor; bool where it lets through

    def sliced_to(self, part: Slice, extent: int) -> GainGrad | None:
        if part.dim not in self.copies:
            return None
        return dataclasses.replace(self, inputs=part.of(self.inputs))

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        (wide,) = widened(delta)
        super().add_square_(fisher, wide * self.inputs)

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        (wide,) = widened(delta[part])
        return self._summed(wide * self.inputs[part])


@dataclasses.dataclass
class EmbeddingGrad:
    """Lookups of an embedding: g_n[v] = Σ_{t: id_nt = v} δ_nt, kept for the rows that occur.

    Equal ids of one sequence form a segment, summed before squaring.
    """

    param: ParamView
    ids: Tensor  # (N, T) int64; -1 where the lookup passes no gradient (padding_idx)

    @functools.cached_property
    def _segments(self) -> tuple[Tensor, Tensor, Tensor]:
        n, rows = self.ids.shape[0], self.param.shape[0]
        first = torch.arange(n, device=self.ids.device)[:, None] * (rows + 1)
        keys, inverse = torch.unique(first + self.ids + 1, return_inverse=True)
        return keys // (rows + 1), keys % (rows + 1) - 1, inverse.flatten()

    @functools.cached_property
    def by_row(self) -> ops.LookupSegments:
        return ops.lookup_segments(self.ids)

    @property
    def sequence(self) -> Tensor:
        """(U,) the sequence of each segment."""
        return self._segments[0]

    @property
    def row(self) -> Tensor:
        """(U,) the embedding row of each segment, -1 where no gradient passes."""
        return self._segments[1]

    def sums(self, delta: Tensor) -> Tensor:
        """(U, D): the gradient of each segment's row, zero where its row is -1."""
        (wide,) = widened(delta)
        flat = self.positions(wide[None]).reshape(-1, self.param.shape[1])
        sums = flat.new_zeros(len(self.row), flat.shape[1]).index_add_(0, self._segments[2], flat)
        return sums.masked_fill_((self.row < 0)[:, None], 0)

    def positions(self, delta: Tensor) -> Tensor:
        return delta.reshape(*delta.shape[:2], -1, self.param.shape[1])

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        ops.lookup_square_(fisher, self.positions(delta).flatten(1, 2), self.by_row)

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        here = self.sliced(part)
        sums = here.sums(delta[part])
        g = sums.new_zeros(len(here.ids), *self.param.shape)
        return g.index_put_((here.sequence, here.row.clamp(min=0)), sums, accumulate=True)

    def sliced(self, part: slice) -> EmbeddingGrad:
        """Return the lookups of some sequences."""
        return dataclasses.replace(self, ids=self.ids[part])

    def through(self, param: ParamView, rows: Tensor) -> EmbeddingGrad:
        """Return the same lookups of `param`, whose row (V,) each row here is; -1 for none."""
        ids = torch.cat([rows, rows.new_full((1,), -1)])[self.ids]
        return dataclasses.replace(self, param=param, ids=ids)

    @staticmethod
    def joined(uses: Sequence[EmbeddingGrad]) -> EmbeddingGrad:
        return EmbeddingGrad(uses[0].param, torch.cat([use.ids for use in uses], dim=1))


@dataclasses.dataclass
class BagGrad(EmbeddingGrad):
    """Bags of an embedding, the weighted sums of L lookups each: ids (N, T·L)."""

    weights: Tensor  # (N, T, L)

    def positions(self, delta: Tensor) -> Tensor:
        bags = super().positions(delta)  # (R, N, T, D)
        return (bags[:, :, :, None] * self.weights[..., None]).flatten(2, 3)

    def sliced(self, part: slice) -> BagGrad:
        return dataclasses.replace(self, ids=self.ids[part], weights=self.weights[part])
