"""The element of a group of symmetries that brings one set of channels closest to another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fisherkern.encoders.symmetry import SymmetryGroup


def best_transform(
    group: SymmetryGroup, correlations: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Return the admissible T of every label with the largest sum of <T, C> over the labels.

    `correlations` (n, n) of every label, in the group's order; None where nothing is known of one.
    """
    found = {label: c for label, c in correlations.items() if c is not None}
    if not found:
        return {}
    if group.kind == "permutation":
        first, *others = found.values()
        return dict.fromkeys(correlations, _assignment(sum(others, first)))
    if group.kind == "signed":
        return _signed(correlations)
    if group.kind in ("rotation", "orthogonal"):
        turn = _rotation if group.kind == "rotation" else _procrustes
        return {label: turn(c) for label, c in found.items()}
    width = group.size // group.heads
    factors = {}
    for label, c in found.items():
        blocks = c.reshape(group.heads, width, group.heads, width).transpose(1, 2)
        factors[label] = torch.linalg.svd(blocks)
    score = torch.stack([s.sum(-1) for _, s, _ in factors.values()]).sum(0)
    order = _assignment(score)
    turned = {}
    for label, (u, _, v) in factors.items():
        matrix = u.new_zeros(group.heads, width, group.heads, width)
        for head, partner in enumerate(order.tolist()):
            matrix[head, :, partner] = u[head, partner] @ v[head, partner]
        turned[label] = matrix.reshape(group.size, group.size)
    return turned


def _assignment(score: Tensor) -> Tensor:
    """(n,) int64 index with the largest sum_i score[i, index_i] of all permutations."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(score.cpu().numpy(), maximize=True)[1])


def _signed(correlations: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """One permutation for all labels, with the best signs for the first."""
    (label, signed), *others = correlations.items()
    assert signed is not None
    index = _assignment(sum((c for _, c in others if c is not None), signed.abs()))
    rows = torch.arange(len(index))
    matrix = torch.zeros_like(signed)
    matrix[rows, index] = torch.where(signed[rows, index] < 0, -1.0, 1.0).to(matrix.dtype)
    return {label: matrix, **{other: index for other, _ in others}}


def _procrustes(correlation: Tensor) -> Tensor:
    """Orthogonal Q with the largest <Q, C>."""
    u, _, v = torch.linalg.svd(correlation)
    product: Tensor = u @ v
    return product


def _rotation(correlation: Tensor) -> Tensor:
    """Orthogonal Q with Q 1 = 1 and the largest <Q, C>: Procrustes in the complement of 1."""
    complement = complement_of_ones(len(correlation)).to(correlation)
    return fixing_ones(_procrustes(complement.t() @ correlation @ complement), complement)


def complement_of_ones(size: int) -> Tensor:
    """Return (size, size - 1) float64, orthonormal columns that are orthogonal to 1."""
    basis = torch.eye(size, dtype=torch.float64)
    basis[:, 0] = 1
    orthonormal: Tensor = torch.linalg.qr(basis)[0]
    return orthonormal[:, 1:]


def fixing_ones(inner: Tensor, complement: Tensor) -> Tensor:
    """Return Q (n, n) with Q 1 = 1 that turns the complement of 1 by `inner` (n - 1, n - 1)."""
    return 1 / len(complement) + complement @ inner @ complement.t()
