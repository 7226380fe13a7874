"""Products of several vectors with one Jacobian."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

# Of a graph: tensors or edges, not both.
Places = Sequence[Tensor] | Sequence[GradientEdge]


def batched_vector_jacobians(outputs: Places, inputs: Places, given: Tensor) -> list[Tensor | None]:
    """Gradients (R, ...) at `inputs` for R gradients `given` (R, ...) of the one output.

    By `torch.vmap`, whose reasons against a graph are raised; None for an input that gets no
    gradient. The graph is kept.
    """
    absent: set[int] = set()

    def gradients(vector: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(outputs, inputs, [vector], retain_graph=True, allow_unused=True)
        absent.update(i for i, gradient in enumerate(found) if gradient is None)
        return [gradient for gradient in found if gradient is not None]

    with warnings.catch_warnings():
        # Of an operator that would be called for one vector after another.
        warnings.filterwarnings("error", message=".*batching rule")
        present = iter(torch.vmap(gradients)(given))
    return [None if i in absent else next(present) for i in range(len(inputs))]


def single_vector_jacobians(outputs: Places, inputs: Places, given: Tensor) -> list[Tensor | None]:
    """The same, one vector after another; sparse gradients become dense."""
    rows = [
        torch.autograd.grad(outputs, inputs, [vector], retain_graph=True, allow_unused=True)
        for vector in given
    ]
    return [
        None if column[0] is None else torch.stack([gradient.to_dense() for gradient in column])
        for column in zip(*rows, strict=True)
    ]


def vector_jacobians(outputs: Places, inputs: Places, given: Tensor) -> list[Tensor | None]:
    """The same, together where they can go together."""
    if len(given) > 1:
        with contextlib.suppress(Exception):  # whatever a model's own backward pass may raise
            return batched_vector_jacobians(outputs, inputs, given)
    return single_vector_jacobians(outputs, inputs, given)
