"""The members' Fishers in common units, and what they cannot decide."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkern.errors import InputError, shown
from fisherkern.merging.blocks import BLOCK, as_table

log = logging.getLogger("fisherkern")

# A tensor whose largest Fisher entry is below this share of its model's mean entry carries no
# information: attention's key biases have Fisher exactly 0, and come out at some 1e-16 of the
# mean by rounding in float32; real entries have been seen down to 1e-8 of it.
NOISE = 1e-10


def check_definitions(made: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuse Fishers that are averages of other things; warn of such as are estimated otherwise.

    Args:
        made: What each is called in a message, and its `meta`; one without `meta` is taken as it
            is.
    """
    known = [(name, meta) for name, meta in made if "sampler" in meta]
    for name, meta in known[1:]:
        first, own = known[0][1], meta
        for key, standard in (("reduction", "sequence"), ("positions", "last")):
            one, other = first.get(key, standard), own.get(key, standard)
            if (one == standard) != (other == standard):
                raise InputError(
                    f"{name} has {key}={shown(other)} and {known[0][0]} {key}={shown(one)}, which "
                    "are averages of other things: compute them alike"
                )
        for key in ("sampler", "k", "weight"):
            if first.get(key) != own.get(key):
                log.warning(
                    "%s has %s=%s and %s %s=%s: the weights of the members differ by it as well",
                    name, key, shown(own.get(key)), known[0][0], key, shown(first.get(key)),
                )  # fmt: skip
                break


def block_sums(value: Tensor) -> Iterator[float]:
    """Yield sums of blocks of rows: the same for a tensor and for its blocks read one by one."""
    table = as_table(value)
    if table.numel():
        for block in table.split(max(1, BLOCK // table.shape[1])):
            yield float(block.sum(dtype=torch.float64))


class Fishers:
    """Checked Fishers of all members, tensor by tensor, with the unit of each member.

    The unit is the mean over all entries of the member's Fisher (normalize="mean"), or the
    mean of those means for every member (normalize=None), so that the floor is relative in
    both cases. A member with a larger catalogue has more entries near 0 and a smaller mean.
    """

    def __init__(self, fishers: Sequence[Mapping[str, Tensor]], normalize: str | None) -> None:
        self._fishers = fishers
        means = []
        for number, fisher in enumerate(fishers):
            total = math.fsum(part for value in fisher.values() for part in block_sums(value))
            mean = total / max(1, sum(value.numel() for value in fisher.values()))
            if mean <= 0:
                raise InputError(f"the Fisher of member {number} is zero everywhere")
            means.append(mean)
        self._means = means
        common = sum(means) / len(means)
        self.units = means if normalize == "mean" else [common] * len(means)

    def of(self, name: str) -> list[Tensor] | None:
        """Every member's Fisher of one tensor, raw; None where it cannot decide.

        It cannot where a member's Fisher lacks the tensor (frozen: it was not measured, which
        is not the same as zero) and where it is rounding noise in every member. Noise in some
        members only is their zero.
        """
        found = [fisher.get(name) for fisher in self._fishers]
        values = [value for value in found if value is not None]
        if len(values) < len(found):
            return None
        informed = [
            value.numel() > 0 and float(value.max()) >= NOISE * mean
            for value, mean in zip(values, self._means, strict=True)
        ]
        if not any(informed):
            return None
        return [
            v if known else torch.zeros_like(v) for v, known in zip(values, informed, strict=True)
        ]

    def scaled(self, name: str) -> list[tuple[Tensor, float]] | None:
        """As `of`, each with the unit to divide it by."""
        values = self.of(name)
        return None if values is None else list(zip(values, self.units, strict=True))

    def coverage(self, names: Sequence[str], floor: float) -> dict[str, list[float]]:
        """Per tensor and member, the share of entries whose Fisher exceeds the floor.

        There the Fisher decides rather than the floor; 0 for a tensor it cannot decide.
        """
        found = {}
        for name in names:
            values = self.scaled(name)
            if values is None:
                found[name] = [0.0] * len(self.units)
                continue
            found[name] = [int((v > floor * unit).sum()) / v.numel() for v, unit in values]
        return found
