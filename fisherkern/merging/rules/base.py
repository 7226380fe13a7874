"""Merge methods: functions from a block of all members' rows to the merged block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fisherkern.members.options import Option, options_of


@dataclass(frozen=True)
class MergeBlock:
    """A block of n rows and c columns of one tensor of all M members.

    A row is an index of the tensor's first dimension: an item, an output neuron.

    Args:
        theta: (M, n, c) float64, the members' values; zeros in rows that a member does not own.
        weights: (M, n, 1) float64, lambda; 0 in rows that a member does not own. At least one
            owner of a row has a positive weight.
        fisher: (M, n, c) float64, non-negative, in units of each member's mean (see `merge`).
            None where the Fisher says nothing about this tensor.
        floor: The relative floor, in the same unit.
        lam: (M,) float64, lambda as given, with sum 1.
        owns: (M, n, 1) bool, whether the member owns the row.
        base: (n, c) float64, values of the model that the members were trained from; zeros in
            rows that it lacks. None without one.
        base_owns: (n, 1) bool, whether the base has the row.
        name: Name of the tensor.
        start: Number of the block's first row in the merged tensor.
        stats: What `MergeMethod.prepare` returned for this tensor.
        seed: Seed of random numbers.
    """

    theta: Tensor
    weights: Tensor
    fisher: Tensor | None
    floor: float
    lam: Tensor
    owns: Tensor
    base: Tensor | None
    base_owns: Tensor
    name: str
    start: int
    stats: Any
    seed: int

    @property
    def members(self) -> int:
        """M."""
        return len(self.theta)


class TensorBlocks(Protocol):
    """The blocks of one tensor, in order; may be gone through several times."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the merged tensor."""
        ...

    @property
    def members(self) -> int:
        """M."""
        ...

    @property
    def grams(self) -> list[Tensor] | None:
        """Every member's Gram matrix of the layer's inputs, if there is one."""
        ...

    @property
    def heads(self) -> tuple[str, int, int] | None:
        """(Attention, number of heads, dimension in which they lie one after another)."""
        ...

    def __iter__(self) -> Iterator[MergeBlock]: ...


Prepare = Callable[[Mapping[str, TensorBlocks], Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class MergeMethod:
    """A merge method; `merge_method` makes one of a function.

    Args:
        name: Name in `merge(method=...)`, recipes and on the command line.
        title: Name for people.
        source: URL of the paper; empty where there is none.
        function: Maps a `MergeBlock`, and the method's options as keywords, to the merged (n, c)
            float64 block.
        inputs: Arguments of `merge` that the method uses, "must" or "may" each: "weights",
            "fishers", "base", "grams", "products", "score", "validation". Others are refused.
        options: Options by name.
        prepare: Maps all tensors' blocks (by name, in the model's order) and the options to
            `stats` by tensor name, where a block alone does not suffice. It may not depend on
            lambda: it runs once in a search. The blocks' `weights` are equal.
        choose: How lambda is found: "given" (an argument, equal by default, or searched),
            "greedy" on the score, "learned" on validation data, or "learned by layer".
    """

    name: str
    title: str
    source: str
    function: Callable[..., Tensor]
    inputs: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    prepare: Prepare | None = None
    choose: str = "given"

    @property
    def takes_weights(self) -> bool:
        """Whether lambda is an argument."""
        return "weights" in self.inputs

    def with_options(self, options: Mapping[str, Any]) -> Callable[[MergeBlock], Tensor]:
        """Return the function with its options set."""
        return partial(self.function, **options)


#: Merge methods by name.
METHODS: dict[str, MergeMethod] = {}

FunctionT = TypeVar("FunctionT", bound=Callable[..., Tensor])


def merge_method(
    name: str,
    *,
    title: str,
    source: str = "",
    needs: Sequence[str] = (),
    takes: Sequence[str] = (),
    prepare: Prepare | None = None,
    choose: str = "given",
) -> Callable[[FunctionT], FunctionT]:
    """Make a merge method of the decorated function, and list it in `METHODS`.

    The function's keyword arguments are the method's options, annotated as `options_of` reads
    them; among these are options that only `prepare` or the search for lambda uses.

    Args:
        name: See `MergeMethod`, as for the other arguments.
        title: Name for people.
        source: URL of the paper.
        needs: Arguments of `merge` that must be given.
        takes: Arguments of `merge` that may be given.
        prepare: What sees whole tensors before the first block is merged.
        choose: How lambda is found.
    """

    def register(function: FunctionT) -> FunctionT:
        inputs = {**dict.fromkeys(takes, "may"), **dict.fromkeys(needs, "must")}
        options = options_of(function)
        METHODS[name] = MergeMethod(name, title, source, function, inputs, options, prepare, choose)
        return function

    return register


def convex(theta: Tensor, share: Tensor) -> Tensor:
    """Return sum_m share_m theta_m / sum_m share_m, within the members' range.

    Args:
        theta: (M, n, c).
        share: Broadcastable to theta, non-negative, with a positive sum over dimension 0.
    """
    merged = (share * theta).sum(0) / share.sum(0)
    # A convex combination lies between its members. Holding it there takes the rounding out:
    # equal members, or a single one with a share, come back bit for bit.
    counts = share > 0
    low = torch.where(counts, theta, torch.inf).amin(0)
    high = torch.where(counts, theta, -torch.inf).amax(0)
    return merged.clamp(low, high)
