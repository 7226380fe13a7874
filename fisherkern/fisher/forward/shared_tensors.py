"""Tensors computed from parameters alone, which all sequences share, used as parameters are.

A table looked up whole, positions repeated, a relative bias, a normed weight: S = f(θ). The call
that uses S says what the gradient of S is for each sequence, and θ's is Jᵀ times that,
J = ∂S/∂θ. In most of them an entry of S is an entry of θ times a number, and J is two lists.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fisherkern.adapters.parameters import Parameters, ParamView
from fisherkern.fisher.forward import fast_ops
from fisherkern.fisher.forward.graph import nodes_below
from fisherkern.fisher.forward.vjp import vector_jacobians

# Parameters of one S that are not lists of entries: each takes a backward pass of its own.
_MOST_COMPUTED = 4


@dataclasses.dataclass(frozen=True)
class SharedView(ParamView):
    """A shared tensor in the place of a parameter, in any shape."""

    tensor: SharedTensor = dataclasses.field(compare=False, repr=False)

    def reshaped(self, *shape: int) -> SharedView:
        return SharedView(self.name, self.start, shape, self.tensor)


@dataclasses.dataclass(frozen=True)
class Entries:
    """J of S by θ where S_s = weight_s · θ[index_s]: index (S,) int64, weight (S,).

    `start`: index is start, start + 1, ...; the same for Sᵀ where `transposed`. None otherwise.
    `once`: no entry of θ stands in S twice, but with weight 0. `direction` (of S's shape) and
    `pulled` = Jᵀ direction tell whether another forward pass's J is the same.
    """

    index: Tensor
    weight: Tensor
    start: int | None
    transposed: bool
    once: bool
    direction: Tensor
    pulled: Tensor

    def rows(self, count: int, shape: tuple[int, ...]) -> Tensor | None:
        """(count,): the row of θ, of `shape`, that is each row of S, -1 where no gradient passes.

        None where S is made of anything but rows.
        """
        if len(shape) != 2 or self.index.numel() != count * shape[1]:
            return None
        index, weight = self.index.view(count, -1), self.weight.view(count, -1)
        passes = weight[:, :1].expand_as(weight)
        whole = (weight == passes) & ((weight == 0) | (weight == 1))
        columns = torch.arange(shape[1], device=index.device)
        whole &= (weight == 0) | (index == (index[:, :1] // shape[1] * shape[1] + columns))
        if not bool(whole.all()):
            return None
        return (index[:, 0] // shape[1]).masked_fill(weight[:, 0] == 0, -1)


# Entries of S by (shape of S, nodes of its graph, parameter), kept from one pass to the next.
EntriesCache = dict[tuple[object, ...], Entries]


class SharedTensor:
    """S: where its gradient arrives, its shape, and how it depends on parameters."""

    def __init__(
        self,
        name: str,
        edge: GradientEdge,
        tensor: Tensor,
        parameters: Parameters,
        cache: EntriesCache,
    ) -> None:
        self.view = SharedView(name, 0, tuple(tensor.shape), self)
        self.parameters = parameters
        self._edge = edge
        self._like = tensor.detach()
        self._cache = cache
        self._entries: dict[str, Entries | None] = {}

    @property
    def numel(self) -> int:
        return self._like.numel()

    @functools.cached_property
    def nodes(self) -> dict[Node, None]:
        """The autograd graph of S, in the order of a walk."""
        return nodes_below(self._edge.node)

    @functools.cached_property
    def names(self) -> list[str]:
        """The parameters of which S is computed."""
        leaves = {id(parameter): name for name, parameter in self.parameters.named.items()}
        found = (leaves.get(id(getattr(node, "variable", None))) for node in self.nodes)
        return sorted(name for name in found if name is not None)

    @functools.cached_property
    def served(self) -> bool:
        """Whether the gradients of its parameters can be had from its own."""
        if any(isinstance(node, fast_ops.WITHOUT_PARAMETERS) for node in self.nodes):
            return False
        return sum(self.entries(name) is None for name in self.names) <= _MOST_COMPUTED

    def entries(self, name: str) -> Entries | None:
        """J by a parameter, where it is a list of entries."""
        if name not in self._entries:
            self._entries[name] = self._found_entries(name)
        return self._entries[name]

    def _found_entries(self, name: str) -> Entries | None:
        parameter = self.parameters.named[name]
        if self._like.dtype != parameter.dtype or not parameter.dtype.is_floating_point:
            return None
        key = (*self._like.shape, name, *(node.name() for node in self.nodes))
        known = self._cache.get(key)
        try:
            if known is not None:
                pulled = self.pull(name, known.direction[None])[0]
                if _alike(pulled, known.pulled):
                    return known
            entries = _find_entries(self._edge, self._like, parameter)
        except (RuntimeError, NotImplementedError):  # a function that cannot be derived twice
            return None
        if entries is not None:
            self._cache[key] = entries
        return entries

    def pull(self, name: str, gradients: Tensor) -> Tensor:
        """Jᵀ g of n gradients, (n, *S's shape) -> (n, *θ's shape)."""
        parameter = self.parameters.named[name]
        given = gradients.reshape(-1, *self._like.shape).to(self._like.dtype)
        (pulled,) = vector_jacobians([self._edge], [parameter], given)
        return given.new_zeros(len(given), *parameter.shape) if pulled is None else pulled


def _alike(one: Tensor, other: Tensor) -> bool:
    largest = other.abs().amax() if other.numel() else other.new_zeros(())
    rounding = min(1e3 * torch.finfo(other.dtype).eps, 0.03)
    return bool(((one - other).abs() <= rounding * largest).all())


def _find_entries(edge: GradientEdge, like: Tensor, parameter: Tensor) -> Entries | None:
    """J read off a few products with it, and proved by one with its transpose."""
    shape, count = like.shape, parameter.numel()
    base = int(0.25 / torch.finfo(parameter.dtype).eps)  # digits that rounding leaves whole
    with torch.enable_grad():
        u = torch.zeros_like(like, requires_grad=True)
        (pulled,) = torch.autograd.grad(
            [edge], [parameter], [u], create_graph=True, allow_unused=True
        )
        if pulled is None or pulled.layout != torch.strided:
            return None

        def product(entries: Tensor) -> Tensor:
            given = entries.view(parameter.shape).to(like.dtype)
            (result,) = torch.autograd.grad(
                pulled, u, given, retain_graph=True, materialize_grads=True
            )
            return result.flatten()

        number = torch.arange(count, device=like.device)
        weight = product(torch.ones_like(number))
        index, place = torch.zeros(like.numel(), dtype=torch.int64, device=like.device), 1
        while place < max(count, 2):
            digit = (product(number // place % base) / weight).round()
            index += torch.where(weight == 0, 0, digit).nan_to_num(-1).long() * place
            place *= base
    if bool(((index < 0) | (index >= count)).any()):
        return None
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(shape, generator=generator, dtype=torch.float64).to(like)
    (given,) = torch.autograd.grad([edge], [parameter], [direction], retain_graph=True)
    claimed = torch.zeros_like(parameter.detach()).flatten()
    claimed.index_add_(0, index, weight * direction.flatten())
    if not _alike(claimed, given.flatten()):
        return None
    passing = index[weight != 0]
    return Entries(
        index,
        weight,
        *_layout(index, weight, shape, count),
        once=passing.unique().numel() == passing.numel(),
        direction=direction,
        pulled=given,
    )


def _layout(
    index: Tensor, weight: Tensor, shape: torch.Size, count: int
) -> tuple[int | None, bool]:
    """`start` and `transposed` of an index."""
    for transposed in (False, True):
        if transposed and len(shape) != 2:
            break
        order, passes = (
            part.view(shape).t().flatten() if transposed else part for part in (index, weight != 0)
        )
        first = passes.nonzero()[:1, 0]
        start = int(order[first] - first) if len(first) else 0
        counted = torch.arange(start, start + len(order), device=index.device)
        if 0 <= start <= count - len(order) and bool(((order == counted) | ~passes).all()):
            return start, transposed
    return None, False
