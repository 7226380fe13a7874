"""Alignment by the weights: the nearest member that its symmetries allow."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fisherkern.alignment.assignment import best_transform
from fisherkern.encoders.symmetry import AxisSpec, Symmetries
from fisherkern.members.symmetries import Transforms, apply_transforms

# Of the reference's squared norm: what a step must gain, more than rounding does, and what a
# round over the groups must, for another. Turns of linked groups settle slowly.
STEP_GAIN, ROUND_GAIN = 1e-12, 1e-8


class WeightPair:
    """A reference's and a member's weights, and how well they overlap under transforms."""

    def __init__(
        self,
        symmetries: Symmetries,
        reference: Mapping[str, Tensor],
        member: Mapping[str, Tensor],
        rows: Mapping[str, tuple[Tensor, Tensor]],
        items: Collection[str],
    ) -> None:
        """`rows`: per tensor with item rows, those of the two that stand for the same item."""
        self.symmetries = symmetries
        self._items = items
        self._parts: list[tuple[str, AxisSpec, Tensor, Tensor]] = []
        self._products: dict[int, Tensor] = {}
        for name in sorted(symmetries.axes.keys() & reference.keys() - symmetries.idle):
            own, other = reference[name].detach(), member[name].detach()
            if name in rows:
                own, other = own[rows[name][0]], other[rows[name][1]]
            for spec in symmetries.axes[name]:
                self._parts.append((name, spec, spec.part_of(own), spec.part_of(other)))
        squares = [own.double().square().sum() for _, _, own, _ in self._parts]
        self.scale = float(torch.stack(squares).sum())

    def of_items(self, name: str) -> bool:
        """Whether group `name` acts on a tensor with a row per item."""
        labels = self.symmetries.labels(name)
        return any(
            label in labels
            for tensor, spec, _, _ in self._parts
            if tensor in self._items
            for label in spec.labels
        )

    def correlation(
        self, label: str, transforms: Transforms, items_only: bool = False
    ) -> Tensor | None:
        """Return (n, n) C, C_ij = <channel i of the reference, channel j of the member>; or None.

        The sum over all tensors with an axis of this label, whose other axes are transformed;
        or over those with a row per item.
        """
        total = None
        for number, (name, spec, _, _) in enumerate(self._parts):
            if items_only and name not in self._items:
                continue
            for dim, own in enumerate(spec.labels):
                if own == label:
                    product = self._product(number, dim, transforms)
                    total = product if total is None else total + product
        return total

    def overlap(self, transforms: Transforms) -> float:
        """Return sum_k <theta_ref,k, (T theta_m)_k>.

        The squared distance falls by twice its gain.
        """
        total = 0.0
        for number, (_, spec, own, other) in enumerate(self._parts):
            labelled = [dim for dim, label in enumerate(spec.labels) if label]
            if len(labelled) == 1:
                product = self._product(number, labelled[0], transforms)
                turn = (str(spec.labels[labelled[0]]), None)
                total += float(apply_transforms(product.t(), turn, transforms).diagonal().sum())
            elif labelled:
                total += float(
                    (own.double() * apply_transforms(other.double(), spec.labels, transforms)).sum()
                )
        return total

    def distance(self, transforms: Transforms) -> float:
        """Return ||theta_ref - T theta_m||, tensors without effect left out."""
        total = 0.0
        for _, spec, own, other in self._parts:
            moved = apply_transforms(other.double(), spec.labels, transforms)
            total += float((own.double() - moved).square().sum())
        return math.sqrt(total)

    def _product(self, number: int, dim: int, transforms: Transforms) -> Tensor:
        _, spec, own, other = self._parts[number]
        rest = tuple(None if d == dim else label for d, label in enumerate(spec.labels))
        if number in self._products:
            return self._products[number]
        moved = apply_transforms(other.double(), rest, transforms)
        size = own.shape[dim]
        first, second = (x.movedim(dim, 0).reshape(size, -1) for x in (own.double(), moved))
        product = first @ second.t()
        if not any(rest):
            self._products[number] = product
        return product


def match_weights(pair: WeightPair, sweeps: int) -> tuple[dict[str, Tensor], int]:
    """Return the transforms with the larger overlap of two descents, and its number of rounds."""
    anchored: dict[str, Tensor] = {}
    for name, group in pair.symmetries.groups.items():
        found = [pair.correlation(x, {}, items_only=True) for x in pair.symmetries.labels(name)]
        if all(c is not None for c in found):
            anchored |= best_transform(
                group, dict(zip(pair.symmetries.labels(name), found, strict=True))
            )
    ends = [_descend(pair, start, sweeps) for start in ([{}, anchored] if anchored else [{}])]
    return max(ends, key=lambda end: pair.overlap(end[0]))


def _descend(
    pair: WeightPair, transforms: dict[str, Tensor], sweeps: int
) -> tuple[dict[str, Tensor], int]:
    """Solve the groups in turn, inner ones first, until no step gains; (transforms, rounds)."""
    best = pair.overlap(transforms)
    groups = pair.symmetries.groups
    # The item table's space is last: what the start says of it holds until the others followed.
    order = sorted(groups, key=pair.of_items)
    for number in range(1, sweeps + 1):
        before = best
        for name in order:
            labels = pair.symmetries.labels(name)
            found = {label: pair.correlation(label, transforms) for label in labels}
            step = transforms | best_transform(groups[name], found)
            # A tensor with two axes of one group makes the step a guess: its gain is checked.
            value = pair.overlap(step)
            if value > best + STEP_GAIN * pair.scale:
                transforms, best = step, value
        if best <= before + ROUND_GAIN * pair.scale:
            return transforms, number
    return transforms, sweeps
