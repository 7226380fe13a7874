"""What a captured call's output gradient says about each parameter, per sequence.

One small class per kind of use and one rule per torch function; `RULES` maps the
function to its rule. A rule returns no uses for a call it cannot describe, and the
parameters of that call then take the fallback. Everywhere: N sequences first, then
any positions, flattened to T.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern import ops
from fisherkern.fisher.capture import Capture, Place, Rule, Use


def _by_position(tensor: Tensor, trailing: int) -> Tensor:
    """(N, ..., *last) -> (N, T, *last) with `trailing` last dimensions kept."""
    kept = tensor.shape[tensor.dim() - trailing :]
    return tensor.reshape(tensor.shape[0], -1, *kept)


@dataclasses.dataclass
class LinearWeight:
    """W of y = x Wᵀ + b: g_n = Σ_t δ_nt x_ntᵀ."""

    place: Place
    inputs: Tensor  # (N, T, I)

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        ops.segment_outer_square_(fisher, _by_position(delta, 1), self.inputs)

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        return torch.bmm(_by_position(delta[part], 1).transpose(1, 2), self.inputs[part])


@dataclasses.dataclass
class MatrixWeight:
    """W of y = x W, (I, O): g_n = Σ_t x_nt δ_ntᵀ."""

    place: Place
    inputs: Tensor  # (N, T, I)

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        ops.segment_outer_square_(fisher, self.inputs, _by_position(delta, 1))

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        return torch.bmm(self.inputs[part].transpose(1, 2), _by_position(delta[part], 1))


@dataclasses.dataclass
class Added:
    """A summand that broadcasts (bias, learned positions): g_n is δ_n summed over the copies."""

    place: Place

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        fisher += self.per_sequence(delta, slice(None)).square().sum(dim=0)

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        delta, shape = delta[part], self.place.shape
        lead = delta.dim() - len(shape)
        # Sequences stay; the other dimensions that broadcasting made are summed.
        if lead == 0:
            shape, lead = shape[1:], 1
        summed = list(range(1, lead))
        summed += [lead + i for i, extent in enumerate(shape) if extent != delta.shape[lead + i]]
        g = delta.sum(dim=summed) if summed else delta
        return g.reshape(delta.shape[0], *self.place.shape)


@dataclasses.dataclass
class NormWeight:
    """The gain of a LayerNorm: g_n = Σ_t δ_nt ∘ x̂_nt."""

    place: Place
    normalised: Tensor  # (N, ..., *place.shape)

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        fisher += self.per_sequence(delta, slice(None)).square().sum(dim=0)

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        product = delta[part] * self.normalised[part]
        return _by_position(product, len(self.place.shape)).sum(dim=1)


@dataclasses.dataclass
class Lookup:
    """Rows of an embedding: g_n[v] = Σ_{t: id_nt = v} δ_nt, kept for the rows that occur.

    Equal ids of one sequence form a segment, summed before squaring.
    """

    place: Place
    ids: Tensor  # (N, T) int64; -1 where the lookup passes no gradient (padding_idx)

    @functools.cached_property
    def _segments(self) -> tuple[Tensor, Tensor, Tensor]:
        n, rows = self.ids.shape[0], self.place.shape[0]
        first = torch.arange(n, device=self.ids.device)[:, None] * (rows + 1)
        keys, inverse = torch.unique(first + self.ids + 1, return_inverse=True)
        return keys // (rows + 1), keys % (rows + 1) - 1, inverse.flatten()

    @functools.cached_property
    def _by_row(self) -> ops.LookupSegments:
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
        flat = delta.reshape(-1, delta.shape[-1])
        sums = flat.new_zeros(len(self.row), flat.shape[1]).index_add_(0, self._segments[2], flat)
        return sums.masked_fill_((self.row < 0)[:, None], 0)

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        ops.lookup_square_(fisher, delta.reshape(1, -1, delta.shape[-1]), self._by_row)

    def add_rows_(self, fisher: Tensor, values: Tensor) -> None:
        """fisher[row] += values, (U, D), summed over the segments."""
        fisher.index_add_(0, self.row.clamp(min=0), values.to(fisher.dtype))

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        here = dataclasses.replace(self, ids=self.ids[part])
        g = delta.new_zeros(len(here.ids), *self.place.shape)
        index = (here.sequence, here.row.clamp(min=0))
        return g.index_put_(index, here.sums(delta[part]), accumulate=True)

    @staticmethod
    def joined(lookups: Sequence[Lookup]) -> Lookup:
        """One lookup of all positions of several lookups of the same place."""
        return Lookup(lookups[0].place, torch.cat([use.ids for use in lookups], dim=1))


def _linear(
    capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
) -> Sequence[Use]:
    def bound(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sequence[Use]:
        uses: list[Use] = []
        if input.dim() < 2 or input.shape[0] != output.shape[0]:
            return uses
        if (place := capture.parameters.place(weight)) is not None:
            uses.append(LinearWeight(place, _by_position(input.detach(), 1)))
        if (place := capture.parameters.place(bias)) is not None:
            uses.append(Added(place))
        return uses

    return bound(*args, **kwargs)


def _matmul(
    capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
) -> Sequence[Use]:
    if len(args) != 2 or kwargs or args[0].dim() < 2 or args[1].dim() != 2:
        return []
    inputs = _by_position(args[0].detach(), 1)
    if (place := capture.parameters.place(args[1])) is not None:
        return [MatrixWeight(place, inputs)]
    if (place := capture.parameters.either_place(args[1])) is not None:
        return [LinearWeight(place, inputs)]
    return []


def _embedding(
    capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
) -> Sequence[Use]:
    def bound(
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Sequence[Use]:
        place = capture.parameters.place(weight)
        if place is None or max_norm is not None or scale_grad_by_freq:
            return []
        ids = input.reshape(input.shape[0], -1)
        if padding_idx is not None:
            ids = ids.masked_fill(ids == padding_idx % place.shape[0], -1)
        return [Lookup(place, ids)]

    return bound(*args, **kwargs)


def _layer_norm(
    capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
) -> Sequence[Use]:
    def bound(
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Sequence[Use]:
        uses: list[Use] = []
        if input.dim() <= len(normalized_shape):
            return uses
        if (place := capture.parameters.place(weight)) is not None:
            x = F.layer_norm(input.detach(), list(normalized_shape), None, None, eps)
            uses.append(NormWeight(place, x))
        if (place := capture.parameters.place(bias)) is not None:
            uses.append(Added(place))
        return uses

    return bound(*args, **kwargs)


def _add(
    capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
) -> Sequence[Use]:
    if kwargs.get("alpha", 1) != 1 or len(args) != 2:
        return []
    if (shared := _shared_lookup(capture, args, output)) is not None:
        return [shared]
    places = [p for p in map(capture.parameters.place, args) if p is not None]
    # With its own extent in the sequences' dimension it is no shared parameter.
    added = [p for p in places if len(p.shape) < output.dim() or p.shape[0] == 1]
    return [Added(p) for p in added] if len(places) == len(added) == 1 else []


def _shared_lookup(capture: Capture, args: tuple[Any, ...], output: Tensor) -> Lookup | None:
    """Rows looked up once and added to every sequence: a lookup by each of them."""
    for tensor in args:
        if id(tensor) in capture.shared_lookups:
            _, place, ids = capture.shared_lookups[id(tensor)]
            if output.shape[1:] == (len(ids), place.shape[1]):
                return Lookup(place, ids.expand(len(output), -1))
    return None


RULES: dict[Callable[..., Any], Rule] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    torch.add: _add,
    torch.Tensor.add: _add,
}
