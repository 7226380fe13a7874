"""Symmetries of an encoder: changes of its parameters that leave its function as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.errors import InputError

AxisLabels = tuple[str | None, ...]


@dataclass(frozen=True)
class SymmetryGroup:
    """A group of orthogonal n x n matrices, and the labels of the axes they act on.

    Args:
        size: n, the length of these axes.
        kind: The matrices of the group:
            "permutation": permutations.
            "signed": permutations with signs for the first label, without signs for the others.
            "orthogonal": all orthogonal matrices.
            "rotation": orthogonal Q with Q 1 = 1. A layer norm without gain commutes with these,
            because they keep mean and variance.
            "heads": one permutation of blocks of n / heads for all labels, times any orthogonal
            matrix within each block, another for each label.
        labels: The axes' labels. Empty: one label, the name of the group.
        heads: Number of blocks of kind "heads".
    """

    size: int
    kind: str = "permutation"
    labels: tuple[str, ...] = ()
    heads: int = 1


@dataclass(frozen=True)
class AxisSpec:
    """A part of a tensor, and the label of each of its dimensions.

    A GRU's weight (3 D, D), for example, holds the gates as (2, D, D) and the candidate as (D, D).

    Args:
        labels: One label a dimension; None where no group acts.
        shape: The part is viewed as this shape. None: its own.
        dim: The part is a range of this dimension of the tensor.
        start: First index of the range.
        length: Number of indices. None: the part is the whole tensor.
    """

    labels: AxisLabels
    shape: tuple[int, ...] | None = None
    dim: int = 0
    start: int = 0
    length: int | None = None

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return the part of `tensor`, a view where the layout allows."""
        if self.length is not None:
            tensor = tensor.narrow(self.dim, self.start, self.length)
        return tensor if self.shape is None else tensor.reshape(self.shape)

    def write(self, tensor: Tensor, part: Tensor) -> None:
        """Write `part` back into `tensor`."""
        if self.length is not None:
            tensor = tensor.narrow(self.dim, self.start, self.length)
        tensor.copy_(part.reshape(tensor.shape))


def whole(*labels: str | None) -> tuple[AxisSpec, ...]:
    """Return the axes of a tensor in one part."""
    return (AxisSpec(labels),)


@dataclass(frozen=True)
class Symmetries:
    """The symmetries of one encoder; an encoder's method `symmetries()` returns them.

    Args:
        groups: Groups by name.
        axes: For every parameter, the parts that it consists of.
        idle: Parameters that the function does not depend on.
        folds: Layer norm -> (weight, bias or None) of every linear map that reads it. The gain of
            the norm can move into these maps, and its bias if all of them have one. Both must
            move before a "rotation" acts.
    """

    groups: dict[str, SymmetryGroup]
    axes: dict[str, tuple[AxisSpec, ...]]
    idle: frozenset[str] = frozenset()
    folds: dict[str, tuple[tuple[str, str | None], ...]] = field(default_factory=dict)

    def labels(self, name: str) -> tuple[str, ...]:
        """Return the labels that group `name` acts on."""
        return self.groups[name].labels or (name,)

    def add_linear(self, name: str, output: str, inputs: str | None) -> None:
        """Describe a linear layer with a bias, from axis `inputs` to axis `output`."""
        self.axes[f"{name}.weight"] = whole(output, inputs)
        self.axes[f"{name}.bias"] = whole(output)

    def add_norm(self, name: str, label: str) -> None:
        """Describe a layer norm's gain and bias."""
        self.axes[f"{name}.weight"] = whole(label)
        self.axes[f"{name}.bias"] = whole(label)

    def add_items(self, model: Any, label: str) -> None:
        """Describe the item table of an encoder, of parts or plain, with D on axis `label`."""
        for name, parameter in model.item_embedding.named_parameters():
            bias = parameter.dim() == 1
            projected = name.endswith("project.weight")
            labels = (label,) if bias else (label, None) if projected else (None, label)
            self.axes[f"item_embedding.{name}"] = whole(*labels)

    def add_output(self, model: Any, label: str) -> None:
        """Describe the output layer of an encoder that calls `add_output`; h has axis `label`."""
        if not model.config["tied"]:
            self.axes["output_embedding"] = whole(None, label)
        self.axes["output_bias"] = whole(None)

    def fold(self, norm: str, readers: Sequence[str]) -> None:
        """Say that the linear layers `readers`, which have biases, alone read layer norm `norm`."""
        self.folds[norm] = tuple((f"{name}.weight", f"{name}.bias") for name in readers)

    def check(self, model: nn.Module) -> None:
        """Raise InputError unless every parameter is described, in parts that fit its shape."""
        sizes = {
            label: group.size for name, group in self.groups.items() for label in self.labels(name)
        }
        for name, parameter in model.named_parameters():
            if name not in self.axes:
                raise InputError(f"the symmetries of {type(model).__name__} lack tensor {name!r}")
            covered = torch.zeros(parameter.shape, dtype=torch.int64)
            for axes in self.axes[name]:
                part = axes.part_of(covered)
                wanted = [sizes.get(label, -1) if label else None for label in axes.labels]
                if len(wanted) != part.dim() or any(
                    size not in (None, have) for size, have in zip(wanted, part.shape, strict=True)
                ):
                    raise InputError(
                        f"tensor {name!r} has a part of shape {tuple(part.shape)}, which the "
                        f"labels {axes.labels} do not fit"
                    )
                axes.write(covered, part + 1)
            if not bool((covered == 1).all()):
                raise InputError(f"the parts of tensor {name!r} do not cover it once")
