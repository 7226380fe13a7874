"""Backward passes of single nodes for gradients that are zero but at a slice of positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from fisherkern.ops.backend import on_gpu


class Slice(NamedTuple):
    """The entries first ... first + length − 1 of dimension `dim` of a node's output."""

    dim: int
    first: int
    length: int

    def of(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """Return the slice of a tensor, along another dimension where one is given."""
        return tensor.narrow(self.dim if dim is None else dim, self.first, self.length)

    def whole(self, delta: Tensor, shape: Sequence[int]) -> Tensor:
        """R gradients of the slice, (R, ...), among zeros, (R, *shape)."""
        if self.length == shape[self.dim]:
            return delta
        result = delta.new_zeros(len(delta), *shape)
        self.of(result, self.dim + 1).copy_(delta)
        return result


class SliceRule(NamedTuple):
    """A node's backward pass of a slice.

    `function` takes R gradients of the slice and gives those of the first of the node's inputs, in
    the order of its `next_functions`, each of the input's slice in `slices`. None for an input that
    gets no gradient, or one that is not a slice.
    """

    function: Callable[[Tensor], Sequence[Tensor | None]]
    slices: Sequence[Slice | None]


def slice_rule(node: Node, given: Slice | None) -> SliceRule | None:
    """Return the rule of a node for gradients of the slice `given`, None where there is none.

    A node that selects a slice has a rule for all of its output, None. A Function has one where
    it has a static method `slice_rule(node, shape, given)`.
    """
    name = type(node).__name__
    if given is None:
        return _selection(name, node)
    shape = shape_of(node)
    if node._input_metadata[0].dtype.is_complex:  # of which a real input gets a part
        return None
    own = getattr(getattr(type(node), "_forward_cls", None), "slice_rule", None)
    if own is not None:
        found: SliceRule | None = own(node, shape, given)
        return found
    if name in ("ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0"):
        return _view(node, shape, given)
    if name == "TransposeBackward0":
        swapped = [_signed(_saved(node, f"dim{i}")) % len(shape) for i in (0, 1)]
        return _transposed(given, *swapped)
    if name in _ENTRYWISE:
        return _entrywise(node, shape, given)
    if name in ("AsStridedBackward0", "CopySlices"):
        return _found(node, shape, given)
    return None


def shape_of(node: Node, output: int = 0) -> torch.Size:
    """Return the shape of a node's output."""
    return torch.Size(node._input_metadata[output].shape)


def has_one_output(node: Node) -> bool:
    return len(node._input_metadata) == 1


# Nodes of which each input's gradient is the output's, entry by entry, times a number.
_ENTRYWISE = {
    "AddBackward0",
    "SubBackward0",
    "RsubBackward1",
    "MulBackward0",
    "DivBackward0",
    "NegBackward0",
    "ReluBackward0",
    "LeakyReluBackward0",
    "EluBackward0",
    "SiluBackward0",
    "TanhBackward0",
    "SigmoidBackward0",
    "MaskedFillBackward0",
    "WhereBackward0",
    "CloneBackward0",
    "ToCopyBackward0",
}


def _saved(node: Node, name: str) -> int:
    saved: int = getattr(node, f"_saved_{name}")
    return saved


def _signed(number: int) -> int:
    """PyTorch shows saved negative numbers modulo 2⁶⁴."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _selection(name: str, node: Node) -> SliceRule | None:
    """x.select(dim, index), or a part of x of consecutive entries along a dimension."""
    if name not in ("SelectBackward0", "SliceBackward0"):
        return None
    (follower, output), *_ = node.next_functions
    if follower is None:
        return None
    shape = shape_of(follower, output)
    dim = _signed(_saved(node, "dim")) % len(shape)
    extent = shape[dim]
    if name == "SelectBackward0":
        one = Slice(dim, _signed(_saved(node, "index")) % extent, 1)
        return SliceRule(lambda delta: [delta.unsqueeze(dim + 1)], [one])
    if _saved(node, "step") != 1:
        return None
    start = _signed(_saved(node, "start"))
    first = min(start if start >= 0 else max(0, start + extent), extent)
    part = Slice(dim, first, shape_of(node)[dim])
    return SliceRule(lambda delta: [delta], [part])


def _view(node: Node, shape: torch.Size, given: Slice) -> SliceRule | None:
    """Another shape, the dimensions up to the slice's kept."""
    (follower, output), *_ = node.next_functions
    kept = given.dim + 1
    if follower is None:
        return None
    inputs = shape_of(follower, output)
    if inputs[:kept] != shape[:kept]:
        return None
    part = [*inputs[: given.dim], given.length, *inputs[kept:]]
    return SliceRule(lambda delta: [delta.reshape(len(delta), *part)], [given])


def _transposed(given: Slice, first: int, second: int) -> SliceRule:
    dims = {first: second, second: first}
    moved = given._replace(dim=dims.get(given.dim, given.dim))
    return SliceRule(lambda delta: [delta.transpose(first + 1, second + 1)], [moved])


def _entrywise(node: Node, shape: torch.Size, given: Slice) -> SliceRule:
    """Return factors: what comes of ones; inputs that were broadcast or moved have none."""
    metadata = node._input_metadata[0]
    one = torch.ones((), dtype=metadata.dtype, device=metadata.device)
    factors = [
        None if factor is None or factor.shape != shape else given.of(factor).clone()
        for factor in _called(node, one.expand(shape))
    ]
    # Of an input that was promoted a node gives a gradient as wide as its own.
    dtypes = [
        None if follower is None else follower._input_metadata[output].dtype
        for follower, output in node.next_functions
    ]
    follows = [
        follower is not None
        and factor is not None
        and shape_of(follower, output) == shape
        and follower._input_metadata[output].device == metadata.device
        for factor, (follower, output) in zip(factors, node.next_functions, strict=True)
    ]

    def function(delta: Tensor) -> list[Tensor | None]:
        return [
            (delta * factor).to(dtype) if factor is not None and kept else None
            for factor, dtype, kept in zip(factors, dtypes, follows, strict=True)
        ]

    return SliceRule(function, [given if kept else None for kept in follows])


def _found(node: Node, shape: torch.Size, given: Slice) -> SliceRule | None:
    """Return what a write in place to a view passes on: the gradient itself or transposed.

    The node does not say what was written. It is linear: what it does to random numbers, one
    another, it does to all. An input that was broadcast gets no slice: the node leaves the sum to
    autograd. None on a GPU, which would be waited for.
    """
    metadata = node._input_metadata[0]
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(math.prod(shape), generator=generator).view(shape)
    random = random.to(metadata.dtype).to(metadata.device)
    if on_gpu(random):
        return None
    dims = [(0, 0), *itertools.combinations(range(len(shape)), 2)]
    rules: list[SliceRule | None] = []
    for result, place in zip(_called(node, random.clone()), node.next_functions, strict=True):
        alike = (
            _transposed(given, *pair)
            for pair in dims
            if result is not None
            and _arrives_at(result, *place)
            and torch.equal(result, random.transpose(*pair))
        )
        rules.append(next(alike, None))

    def function(delta: Tensor) -> list[Tensor | None]:
        return [None if rule is None else rule.function(delta)[0] for rule in rules]

    return SliceRule(function, [None if rule is None else rule.slices[0] for rule in rules])


def _arrives_at(gradient: Tensor, follower: Node | None, output: int) -> bool:
    """Whether a gradient is of the shape and type of what it is a gradient of."""
    if follower is None:
        return False
    metadata = follower._input_metadata[output]
    return gradient.shape == shape_of(follower, output) and gradient.dtype == metadata.dtype


def _called(node: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients that a node gives to its inputs."""
    with torch.no_grad():
        found = node(delta)
    return found if isinstance(found, tuple) else (found,)
