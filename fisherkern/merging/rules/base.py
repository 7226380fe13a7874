"""What a merge rule is: a function from operands to a merged block, and what it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherkern.errors import InputError


@dataclass(frozen=True)
class Operands:
    """What a rule may use to merge a block of n rows and c columns of one tensor.

    A row is an index of the tensor's first dimension: an item, an output neuron.

    theta: (M, n, c) float64, the members' values; a row a member does not own holds zeros.
    weights: (M, n, 1) float64, lambda; 0 in the rows a member does not own, and in every row
        at least one owner has a positive weight.
    fisher: (M, n, c) float64, non-negative, each member's in units of its mean (see `merge`);
        None where the Fisher says nothing about this tensor.
    floor: the relative floor, in the same unit.
    lam: (M,) float64, lambda as given, with sum 1.
    owns: (M, n, 1) bool, whether the member owns the row.
    base: (n, c) float64, the common ancestor's values, zeros in rows it lacks; None without one.
    base_owns: (n, 1) bool.
    name, start: the tensor, and the number of the block's first row in the merged one.
    options: the rule's options, complete and checked. stats: what `Rule.prepare` found for this
        tensor. seed: of the random numbers.
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
    options: Mapping[str, Any]
    stats: Any
    seed: int

    @property
    def members(self) -> int:
        return len(self.theta)


class Blocks(Protocol):
    """One tensor's operands, block after block; may be gone through several times.

    shape: of the merged tensor. grams: the Gram matrix of its inputs for each member, if it has
    any. heads: the attention it belongs to, the number of heads, and the dimension in which
    they stand one after another.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def members(self) -> int: ...
    @property
    def grams(self) -> list[Tensor] | None: ...
    @property
    def heads(self) -> tuple[str, int, int] | None: ...

    def __iter__(self) -> Iterator[Operands]: ...


@dataclass(frozen=True)
class Option:
    """One option of a rule: its default, what it may be, and how to say that."""

    default: Any
    allows: Callable[[Any], bool]
    expected: str


def number(default: float, low: float, high: float = math.inf, *, above: bool = False) -> Option:
    """A finite number of at least `low` (`above`: more than), at most `high`."""

    def allows(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        inside = low < value <= high if above else low <= value <= high
        return inside and math.isfinite(value)

    bound = f"above {low:g}" if above else f"of at least {low:g}"
    limit = "" if high == math.inf else f" and at most {high:g}"
    return Option(default, allows, f"a number {bound}{limit}")


def integer(default: int, low: int) -> Option:
    """An integer of at least `low`."""

    def allows(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    return Option(default, allows, f"an integer of at least {low}")


def choice(default: str, *others: str) -> Option:
    """One of a few words, the first by default."""
    words = (default, *others)
    return Option(default, lambda value: value in words, " or ".join(map(repr, words)))


@dataclass(frozen=True)
class Rule:
    """A merge rule.

    function: Operands -> the merged (n, c) float64 block.
    inputs: which arguments of `merge` it uses, "must" or "may" each: "weights", "fishers",
        "base", "grams", "products", "score", "validation". What is not named is refused.
    options: name -> Option.
    prepare: what the rule must know of whole tensors before it can do a block: a mapping from
        tensor names to `stats`, from every tensor's blocks (name -> Blocks, in the model's
        order) and the options. It may not depend on lambda, so that it runs once in a search.
        In the blocks it sees, `weights` are equal.
    choose: how lambda is found: "given" (an argument, equal by default, or searched), "greedy"
        on the score, "learned" on validation data, or "learned by layer".
    """

    function: Callable[[Operands], Tensor]
    inputs: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    prepare: Callable[[Mapping[str, Blocks], Mapping[str, Any]], Mapping[str, Any]] | None = None
    choose: str = "given"

    @property
    def takes_weights(self) -> bool:
        return "weights" in self.inputs


def check_options(method: str, rule: Rule, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The rule's options, defaults filled in; InputError names one that is unknown or wrong."""
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"options is a {type(given).__name__}, not a mapping from names to values")
    found = {name: option.default for name, option in rule.options.items()}
    for name, value in (given or {}).items():
        if name not in rule.options:
            known = ", ".join(rule.options)
            raise InputError(
                f"method {method!r} has no option {name!r}; "
                + (f"it has {known}" if known else "it has none")
            )
        if not rule.options[name].allows(value):
            expected = rule.options[name].expected
            raise InputError(f"option {name!r} is {value!r} where {expected} was expected")
        found[name] = value
    return found


def convex(theta: Tensor, share: Tensor) -> Tensor:
    """sum_m share_m theta_m / sum_m share_m over dimension 0, within the members' range.

    theta (M, n, c), share broadcastable to it, non-negative with a positive sum.
    """
    merged = (share * theta).sum(0) / share.sum(0)
    # A convex combination lies between its members. Holding it there takes the rounding out:
    # equal members, or a single one with a share, come back bit for bit.
    counts = share > 0
    low = torch.where(counts, theta, torch.inf).amin(0)
    high = torch.where(counts, theta, -torch.inf).amax(0)
    return merged.clamp(low, high)


def average(x: Operands) -> Tensor:
    """theta* = sum_m lambda_m theta_m / sum_m lambda_m, over the owners of each row."""
    return convex(x.theta, x.weights)
