"""Factors L of every sequence's item covariance, one per sampler.

With h the encoder's output, J_k = ∂h/∂θ_k and C = Σ_y p(y) (w_y − w̄)(w_y − w̄)ᵀ, any L
with L Lᵀ = C (or E[L Lᵀ] = C) gives the Fisher as Σ_r (J_kᵀ L_:r)²; L's columns are
the probes, one backward pass each. Design section 1; the paper's eqs. 5 to 9.

For a row of a tied embedding the lookup's gradient S_v and the output's (1[v=y] − p_v) h
are added before squaring. The cross term is 2 h ∘ Σ_r β_vr S_v^r with L β_v = m_v,
m_v = Σ_y ω_y (1[v=y] − p_v)(w_y − w̄), the sum over the items the sampler uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fisherkern import ops
from fisherkern.errors import InputError
from fisherkern.ops import counter

SAMPLERS = ("exact", "sketch", "topk", "model", "random", "target")

# Multiply-adds per sequence up to which C is formed: 10⁵ items at D = 64.
_COVARIANCE_LIMIT = 2**28
# What stands for as many probes as there are items.
_MANY_PROBES = 2**10


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `diag_fisher` that choose the estimator."""

    sampler: str
    k: int
    probes: int | None
    seed: int
    tol: float | None
    rescale: bool
    weight: str
    replacement: bool = True

    def most_probes(self, width: int | None) -> int:
        """Probes that a factor over `width` dimensions has at most; None: over all logits."""
        asked = {"exact": self.probes, "sketch": self.probes, "target": 1}
        number = asked.get(self.sampler, self.k)
        return min(number or _MANY_PROBES, width or _MANY_PROBES)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The output layer's inputs for one chunk, and what one pass over the items gives.

    h (N, D), weight (V, D), bias (V,) or None, number (N,) int64: each sequence's place
    in the loader, which keys its random numbers; target (N,) int64 columns, for
    sampler="target" only. lse (N,); mean (N, D): w̄; top: probabilities and columns of
    the most likely items, (N, k) each, for sampler="topk" only; ranges (N, ⌈V/256⌉):
    log-sum-exps of the ranges of items, for the others.
    """

    h: Tensor
    weight: Tensor
    bias: Tensor | None
    number: Tensor
    target: Tensor | None
    lse: Tensor
    mean: Tensor
    top: tuple[Tensor, Tensor] | None
    ranges: Tensor | None

    @classmethod
    def of(
        cls,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        number: Tensor,
        target: Tensor | None,
        settings: Settings,
    ) -> Rows:
        """The pass over the items that every sampler needs, with topk's own work in it."""
        inputs = h, weight, bias
        if settings.sampler == "topk":
            _check_k(settings.k, len(weight))
            p, ids, lse, mean = ops.softmax_topk(*inputs, settings.k)
            return cls(*inputs, number, target, lse, mean, (p, ids), None)
        lse, mean, ranges = ops.softmax_mean(*inputs)
        return cls(*inputs, number, target, lse, mean, None, ranges)

    @property
    def num_items(self) -> int:
        return len(self.weight)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Probabilities and columns of the k most likely items, (N, k) each."""
        assert self.top is not None and self.top[1].shape[1] == k
        return self.top

    def draw(self, k: int, seed: int) -> Tensor:
        """k draws from each softmax, (N, k) int64."""
        return ops.sample_items(*self._sampled(), k, seed)

    def draw_distinct(self, k: int, seed: int) -> tuple[Tensor, Tensor]:
        """k draws without replacement and their weights, (N, k) each."""
        return ops.sample_distinct(*self._sampled(), k, seed)

    def _sampled(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        assert self.ranges is not None
        return self.h, self.weight, self.bias, self.lse, self.ranges, self.number

    def log_probability(self, sequence: Tensor, item: Tensor) -> Tensor:
        """log p_sequence(item) for pairs, (U,) and (U,) -> (U,)."""
        z = (self.h[sequence] * self.weight[item]).sum(dim=1)
        if self.bias is not None:
            z = z + self.bias[item]
        return z - self.lse[sequence]


Columns = Callable[[Tensor, slice], Tensor]


@dataclasses.dataclass(frozen=True)
class Factor:
    """L of every sequence: `probes` columns.

    columns(sequence (n,), which): those of some sequences and probes, (R, n, D).
    ids, omega (N, K): the items used and their weights ω, None where the output
    layer takes all items in closed form. cross(sequence (U,), item (U,)) -> β (U, R),
    for pairs in the order of their sequences.
    mass: Σ_j p(y_j) per sequence, (N,), for topk. kept: share of trace(C) in L.
    """

    probes: int
    columns: Columns
    cross: Callable[[Tensor, Tensor], Tensor]
    ids: Tensor | None = None
    omega: Tensor | None = None
    mass: Tensor | None = None
    kept: Tensor | None = None


def factorise(rows: Rows, settings: Settings) -> Factor:
    """The factor that `settings.sampler` asks for."""
    if settings.sampler == "exact":
        return _exact(rows, settings)
    if settings.sampler == "sketch":
        width = rows.h.shape[1]
        if len(rows.weight) * width * (width + 1) // 2 <= _COVARIANCE_LIMIT:
            return _hybrid_sketch(rows, settings)
        return _streamed_sketch(rows, settings)
    ids, omega, mass = sample(rows, settings)
    return _from_items(rows, ids, omega, mass)


class Distribution(Protocol):
    """What sampling needs of the softmax of every sequence; see Rows for the members."""

    @property
    def number(self) -> Tensor: ...
    @property
    def target(self) -> Tensor | None: ...
    @property
    def num_items(self) -> int: ...
    def topk(self, k: int) -> tuple[Tensor, Tensor]: ...
    def draw(self, k: int, seed: int) -> Tensor: ...
    def draw_distinct(self, k: int, seed: int) -> tuple[Tensor, Tensor]: ...
    def log_probability(self, sequence: Tensor, item: Tensor) -> Tensor: ...


def sample(rows: Distribution, settings: Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    """The items of an item sampler: ids (N, K) int64, weights ω (N, K), captured mass (N,)."""
    n, k, v = len(rows.number), settings.k, rows.num_items
    if settings.sampler in ("topk", "random"):
        _check_k(k, v)
    if settings.sampler == "topk":
        p, ids = rows.topk(k)
        mass = p.sum(dim=1)
        return ids, p / mass[:, None] if settings.rescale else p, mass
    if settings.sampler == "model" and not settings.replacement:
        return *rows.draw_distinct(min(k, v), settings.seed), None
    if settings.sampler == "model":
        ids = rows.draw(k, settings.seed)
        return ids, torch.full(ids.shape, 1 / k, device=ids.device), None
    if settings.sampler == "random":
        sample_number = torch.arange(k, device=rows.number.device)
        ids = (counter.uniform(settings.seed, rows.number, sample_number) * v).long()
        scale = v / k
    else:
        assert rows.target is not None
        ids, scale = rows.target[:, None], 1.0
        if ((ids < 0) | (ids >= v)).any():
            raise InputError(f"batch: a target is not one of the model's {v} items")
        if settings.weight == "one":
            return ids, torch.ones(ids.shape, device=ids.device), None
    sequence = torch.arange(n, device=ids.device).repeat_interleave(ids.shape[1])
    p = rows.log_probability(sequence, ids.flatten()).exp().view(ids.shape)
    return ids, p * scale, None


def _check_k(k: int, v: int) -> None:
    if k > v:
        raise InputError(f"k: {k} items of a catalogue of {v} cannot be taken")


def _from_items(rows: Rows, ids: Tensor, omega: Tensor, mass: Tensor | None) -> Factor:
    mean = rows.mean
    root = omega.to(mean.dtype).sqrt()
    columns = root[:, :, None] * (rows.weight[ids].to(mean.dtype) - mean[:, None])  # (N, K, D)

    def coefficients(sequence: Tensor, item: Tensor) -> Tensor:
        """sqrt(ω_j) (1[v = y_j] − p_v), (U, K)."""
        p = rows.log_probability(sequence, item).exp()
        hit = (ids[sequence] == item[:, None]).to(p.dtype)
        return root[sequence] * (hit - p[:, None])

    if ids.shape[1] <= rows.h.shape[1]:
        return Factor(
            probes=ids.shape[1],
            columns=_columns_of(columns),
            cross=coefficients,
            ids=ids,
            omega=omega,
            mass=mass,
        )
    # More columns than dimensions: D probes say the same, so time stops growing with K.
    wide = columns.double()
    basis, values, _ = _eigen(wide.transpose(1, 2) @ wide, columns.dtype, rows.h.shape[1])

    def cross(sequence: Tensor, item: Tensor) -> Tensor:
        moment = torch.einsum("uk,ukd->ud", coefficients(sequence, item), columns[sequence])
        return _solve(basis, values, sequence, moment)

    return Factor(
        probes=basis.shape[2],
        columns=_scaled_columns(basis, values, columns.dtype),
        cross=cross,
        ids=ids,
        omega=omega,
        mass=mass,
    )


def _eigen(matrix: Tensor, dtype: torch.dtype, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top `rank` eigenpairs in fp64, largest first: vectors (N, D, R), values (N, R), trace (N,).

    Values are held above the rounding of `dtype`: a direction whose value is noise
    keeps its cross term, which does not depend on the value (L β = m whatever it is).
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    values, vectors = values.flip(1)[:, :rank], vectors.flip(2)[:, :, :rank]
    trace = matrix.diagonal(dim1=1, dim2=2).double().sum(dim=1)
    floor = values[:, :1].clamp(min=torch.finfo(dtype).tiny) * torch.finfo(dtype).eps
    return vectors, values.maximum(floor), trace


def _columns_of(every: Tensor) -> Columns:
    """Those of all sequences, (N, R, D), held."""
    return lambda sequence, which: every[sequence, which].transpose(0, 1)


def _scaled_columns(basis: Tensor, values: Tensor, dtype: torch.dtype) -> Columns:
    def columns(sequence: Tensor, which: slice) -> Tensor:
        scaled = basis[sequence][:, :, which] * values[sequence, which].sqrt()[:, None]
        return scaled.to(dtype).permute(2, 0, 1)

    return columns


def _solve(basis: Tensor, values: Tensor, sequence: Tensor, moment: Tensor) -> Tensor:
    """β with L β = m for pairs: (U, D) moments -> (U, R); zero where a value is zero.

    `sequence` (U,) must not fall: pairs are projected sequence by sequence, padded to the
    longest, so that no basis is copied for a pair.
    """
    if len(sequence) == 0:
        return basis.new_zeros(0, basis.shape[2])
    present, local, counts = torch.unique_consecutive(
        sequence, return_inverse=True, return_counts=True
    )
    basis, values = basis[present], values[present]
    position = torch.arange(len(local), device=local.device)
    position = position - (counts.cumsum(0) - counts)[local]
    padded = basis.new_zeros(len(basis), int(counts.max()), moment.shape[1])
    padded[local, position] = moment.to(basis.dtype)
    root = values.sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    return (torch.bmm(padded, basis) * inverse[:, None])[local, position]


def _all_items_moment(rows: Rows) -> Callable[[Tensor, Tensor], Tensor]:
    """m_v = p_v (w_v − w̄), the sum over all items."""

    def moment(sequence: Tensor, item: Tensor) -> Tensor:
        p = rows.log_probability(sequence, item).exp()
        return p[:, None] * (rows.weight[item].to(p.dtype) - rows.mean[sequence])

    return moment


def _eigen_of_covariance(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """(basis, values, trace) of every sequence's C, all D directions or V − 1."""
    covariance = ops.softmax_covariance(rows.h, rows.weight, rows.bias, rows.lse, rows.mean)
    rank = min(rows.h.shape[1], max(len(rows.weight) - 1, 1))
    return _eigen(covariance, rows.mean.dtype, rank)


def _exact(rows: Rows, settings: Settings) -> Factor:
    basis, values, trace = _eigen_of_covariance(rows)
    if settings.tol is not None:
        # Per sequence, the fewest directions that leave at most tol of the trace out.
        tail = trace[:, None] - values.cumsum(dim=1)
        needed = (tail > settings.tol * trace[:, None]).sum(dim=1) + 1
        number = torch.arange(values.shape[1], device=values.device)
        values = values.masked_fill(number[None] >= needed[:, None], 0.0)
        keep = int(needed.clamp(max=values.shape[1]).max())
        basis, values = basis[:, :, :keep], values[:, :keep]
    if settings.probes is not None:
        basis, values = basis[:, :, : settings.probes], values[:, : settings.probes]
    moment = _all_items_moment(rows)
    return Factor(
        probes=basis.shape[2],
        columns=_scaled_columns(basis, values, rows.mean.dtype),
        cross=lambda sequence, item: _solve(basis, values, sequence, moment(sequence, item)),
        kept=values.sum(dim=1) / trace.clamp(min=torch.finfo(trace.dtype).tiny),
    )


def _hybrid_sketch(rows: Rows, settings: Settings) -> Factor:
    """The top directions of C kept exactly, the rest sketched in C's own eigenbasis.

    The remaining directions are dealt into buckets and summed with random signs, as
    `softmax_sketch` does with items: the same expectation, with less to be random about.
    """
    assert settings.probes is not None
    basis, values, _ = _eigen_of_covariance(rows)
    if settings.probes >= basis.shape[2]:
        top, sketched = basis.shape[2], 0
    else:
        top = settings.probes // 2
        sketched = settings.probes - top
    moment = _all_items_moment(rows)
    rest = torch.arange(basis.shape[2] - top, device=basis.device)
    signs = counter.put_random_signs_(
        basis.new_ones(len(basis), len(rest)), settings.seed, rows.number, rest
    )
    bucket = counter.bucket_at(settings.seed, rest, max(sketched, 1))
    scaled = basis * values[:, None].sqrt()
    dealt = scaled.new_zeros(*scaled.shape[:2], sketched)
    dealt.index_add_(2, bucket, scaled[:, :, top:] * signs[:, None])
    columns = torch.cat([scaled[:, :, :top], dealt], dim=2).to(rows.mean.dtype)

    def cross(sequence: Tensor, item: Tensor) -> Tensor:
        alpha = _solve(basis, values, sequence, moment(sequence, item))
        signed = alpha[:, top:] * signs[sequence]
        beta = signed.new_zeros(len(signed), sketched).index_add_(1, bucket, signed)
        return torch.cat([alpha[:, :top], beta], dim=1)

    return Factor(probes=top + sketched, columns=_columns_of(columns.transpose(1, 2)), cross=cross)


def _streamed_sketch(rows: Rows, settings: Settings) -> Factor:
    assert settings.probes is not None
    probes, seed = settings.probes, settings.seed
    u, totals = ops.softmax_sketch(
        rows.h, rows.weight, rows.bias, rows.lse, rows.mean, rows.number, probes, seed
    )

    def cross(sequence: Tensor, item: Tensor) -> Tensor:
        log_p = rows.log_probability(sequence, item)
        signs = counter.random_signs_at(seed, rows.number[sequence], item, u.dtype)
        bucket = counter.bucket_at(seed, item, probes)
        beta = -log_p.exp()[:, None] * totals[sequence]
        own = (0.5 * log_p).exp() * signs
        return beta.scatter_add_(1, bucket[:, None], own[:, None])

    return Factor(probes=probes, columns=_columns_of(u), cross=cross)
