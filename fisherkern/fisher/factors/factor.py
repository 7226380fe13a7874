"""The factor L of every sequence's item covariance, C = L Lᵀ, and the algebra that makes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

ProbeVectors = Callable[[Tensor, slice], Tensor]


@dataclasses.dataclass(frozen=True)
class CovarianceFactor:
    """L of every sequence: `probes` columns, the probe vectors.

    probe_vectors(sequence (n,), probes): those of some sequences and probes, (R, n, D).
    ids, omega (N, K): the items used and their weights ω, None where the output
    layer takes all items in closed form. tied_cross_term(sequence (n,), items (n, m)) ->
    β (n, m, R), for m items of each sequence.
    mass: Σ_j p(y_j) per sequence, (N,), for topk. kept: share of trace(C) in L.
    """

    probes: int
    probe_vectors: ProbeVectors
    tied_cross_term: Callable[[Tensor, Tensor], Tensor]
    ids: Tensor | None = None
    omega: Tensor | None = None
    mass: Tensor | None = None
    kept: Tensor | None = None

    def after(self, first: int) -> CovarianceFactor:
        """Return the probes and cross terms of the sequences from `first` on, numbered from 0."""
        vectors, cross = self.probe_vectors, self.tied_cross_term
        return CovarianceFactor(
            self.probes,
            lambda sequence, probes: vectors(sequence + first, probes),
            lambda sequence, items: cross(sequence + first, items),
        )


def cholesky(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """L of matrix = L Lᵀ in fp64, (N, D, D) lower triangular, for covariances of `dtype`.

    A rounding of the largest variance is added to the diagonal. A matrix that is not
    positive even so, singular and moved below 0 by rounding, goes through its eigenvectors,
    their values held as in `eigen`. L is invertible, and L β = m holds for every m whatever
    was added. For the moments m_v of items that enter the covariance |β_v|² <= p_v, so that
    what a small pivot magnifies stays within rounding. Waits for a GPU once.
    """
    matrix = matrix.double()
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    largest = diagonal.amax(dim=1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    raised = diagonal + torch.finfo(dtype).eps * largest
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(torch.diagonal_scatter(matrix, raised, 0, 1, 2))
    singular = failed.nonzero()[:, 0]
    if len(singular):
        basis, values, _ = eigen(matrix[singular], dtype, matrix.shape[1])
        # (Q √Λ)ᵀ = P R with P orthogonal, so that Q Λ Qᵀ = Rᵀ R.
        scaled = basis * values.sqrt()[:, None]
        lower[singular] = torch.linalg.qr(scaled.transpose(1, 2)).R.transpose(1, 2)
    return lower


def solve_lower(lower: Tensor, moments: Tensor) -> Tensor:
    """β with L β = m: (n, D, D) lower triangular, (n, m, D) moments -> (n, m, D)."""
    given = moments.to(lower.dtype).transpose(1, 2)
    beta: Tensor = torch.linalg.solve_triangular(lower, given, upper=False)
    return beta.transpose(1, 2)


def eigen(matrix: Tensor, dtype: torch.dtype, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top `rank` eigenpairs in fp64, largest first: vectors (N, D, R), values (N, R), trace (N,).

    Values are held above the rounding of `dtype`: a direction whose value is noise
    keeps its cross term, which does not depend on the value (L β = m whatever it is).
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    values, vectors = values.flip(1)[:, :rank], vectors.flip(2)[:, :, :rank]
    trace = matrix.diagonal(dim1=1, dim2=2).double().sum(dim=1)
    floor = values[:, :1].clamp(min=torch.finfo(dtype).tiny) * torch.finfo(dtype).eps
    return vectors, values.maximum(floor), trace


def stored_vectors(every: Tensor) -> ProbeVectors:
    """Return the probe vectors of all sequences, (N, R, D), stored."""
    return lambda sequence, probes: every[sequence, probes].transpose(0, 1)


def matrix_vectors(matrix: Tensor, dtype: torch.dtype) -> ProbeVectors:
    """Return the columns of (N, D, R) matrices, cast when they are taken."""
    return lambda sequence, probes: matrix[sequence][:, :, probes].to(dtype).permute(2, 0, 1)


def project(basis: Tensor, values: Tensor, moments: Tensor) -> Tensor:
    """β with L β = m for L = basis · sqrt(values): (n, m, D) -> (n, m, R); 0 where a value is."""
    root = values.sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    return (moments.to(basis.dtype) @ basis) * inverse[:, None]
