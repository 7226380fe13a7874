"""Products of several vectors with one Jacobian."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisherkern.errors import InputError

# Of a graph: tensors or edges, not both.
Places = Sequence[Tensor] | Sequence[GradientEdge]


def batched_vector_jacobians(
    outputs: Places, inputs: Places, given: Sequence[Tensor], compared: bool
) -> list[Tensor | None]:
    """Gradients (R, ...) at `inputs` for R gradients `given` (R, ...) of each output.

    By `torch.vmap`, whose reasons against a graph are raised; None for an input that gets no
    gradient. The graph is kept. `compared`: the last vector's gradients are also computed alone,
    as PyTorch's rules for `vmap` are not right for every function (`torch.cdist` in 2.13); where
    they differ, RuntimeError is raised.
    """
    absent: set[int] = set()

    def gradients(*vectors: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(outputs, inputs, vectors, retain_graph=True, allow_unused=True)
        absent.update(i for i, gradient in enumerate(found) if gradient is None)
        return [gradient for gradient in found if gradient is not None]

    with warnings.catch_warnings():
        # Of an operator that would be called for one vector after another.
        warnings.filterwarnings("error", message=".*batching rule")
        present = iter(torch.vmap(gradients)(*given))
    together = [None if i in absent else next(present) for i in range(len(inputs))]
    if compared:
        alone = single_vector_jacobians(outputs, inputs, [vectors[-1:] for vectors in given])
        check_alike([found if found is None else found[-1:] for found in together], alone)
    return together


def check_alike(together: Sequence[Tensor | None], alone: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError where gradients differ by more than rounding."""
    if any((one is None) != (other is None) for one, other in zip(together, alone, strict=True)):
        raise RuntimeError("torch.vmap gives gradients where autograd gives none")
    gaps, sizes, roundings = [], [], []
    for one, other in zip(together, alone, strict=True):
        if one is not None and other is not None and one.numel():
            gaps.append((one - other).abs().amax().double())
            sizes.append(other.abs().amax().double())
            roundings.append(min(2e4 * torch.finfo(other.dtype).eps, 0.25))
    if not gaps:
        return
    gap, size = torch.stack([torch.stack(gaps), torch.stack(sizes)]).tolist()
    # What cancels is rounding of the largest.
    noise = 1e-3 * max(roundings) * max(size)
    for off, most, rounding in zip(gap, size, roundings, strict=True):
        if not off <= rounding * most + noise:
            raise RuntimeError(f"torch.vmap gives gradients that are {off:.2g} of {most:.2g} off")


def single_vector_jacobians(
    outputs: Places, inputs: Places, given: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the same, one vector after another; sparse gradients become dense."""
    rows = [
        torch.autograd.grad(outputs, inputs, vectors, retain_graph=True, allow_unused=True)
        for vectors in zip(*given, strict=True)
    ]
    return [
        None if column[0] is None else torch.stack([gradient.to_dense() for gradient in column])
        for column in zip(*rows, strict=True)
    ]


def vector_jacobians(outputs: Places, inputs: Places, given: Tensor) -> list[Tensor | None]:
    """Return the same of one output, together where they can go together."""
    if len(given) > 1:
        with contextlib.suppress(Exception):  # whatever a model's own backward pass may raise
            return batched_vector_jacobians(outputs, inputs, [given], compared=True)
    return single_vector_jacobians(outputs, inputs, [given])


# Of gradients that are tried at two other sizes; powers of 2 round nothing.
_POWER = 30


def linear_vector_jacobians(
    output: Tensor, inputs: Sequence[Tensor], given: Tensor
) -> list[Tensor | None]:
    """Gradients at `inputs` for a gradient of `output`, strided; None where none comes.

    Raises:
        InputError: They are no linear function of it, so their squares sum to no Fisher.
    """

    def gradients(power: int) -> list[Tensor | None]:
        found = torch.autograd.grad(
            output, inputs, given * 2.0**power, retain_graph=True, allow_unused=True
        )
        return [None if g is None else g.to_dense() for g in found]

    plain = gradients(0)
    if output.dtype == torch.float16:  # of too few powers
        return plain
    for power in (_POWER, -_POWER):
        for one, other in zip(plain, gradients(power), strict=True):
            if one is None or other is None or not one.numel():
                continue
            gap = (other.to(one.dtype) * 2.0**-power - one).abs().max()
            if bool(gap > 1e-3 * one.abs().max()):
                raise InputError(
                    "model: its backward pass is no linear function, as where a hook or a function "
                    "of its own clips gradients, so it has no Fisher; take that out"
                )
    return plain
