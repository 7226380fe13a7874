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
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.fisher.factors.factor import (
    CovarianceFactor,
    cholesky,
    eigen,
    matrix_vectors,
    project,
    solve_lower,
    stored_vectors,
)
from fisherkern.fisher.factors.item_table import ItemTable
from fisherkern.fisher.factors.saturated import SaturatedRows
from fisherkern.fisher.factors.streamed_sketch import streamed_sketch
from fisherkern.fisher.settings import Settings
from fisherkern.ops import counter_rng

# Multiply-adds per sequence up to which C is formed: 10⁵ items at D = 64.
_COVARIANCE_LIMIT = 2**28


@dataclasses.dataclass(frozen=True)
class SoftmaxStats:
    """The softmax of every sequence: the output layer's inputs, and one pass over the items.

    h (N, D); table: W and b; sequence_ids (N,) int64: indices in the
    loader, which key random numbers; target (N,) int64 columns, for
    sampler="target" only. lse (N,); mean (N, D): w̄; top: probabilities and columns of
    the most likely items, (N, k) each, for sampler="topk" only; ranges (N, ⌈V/256⌉):
    log-sum-exps of the ranges of items, for the others; saturated: the rows that need more care.
    """

    h: Tensor
    table: ItemTable
    sequence_ids: Tensor
    target: Tensor | None
    lse: Tensor
    mean: Tensor
    top: tuple[Tensor, Tensor] | None
    ranges: Tensor | None
    saturated: SaturatedRows | None

    @classmethod
    def of(
        cls,
        h: Tensor,
        table: ItemTable,
        sequence_ids: Tensor,
        target: Tensor | None,
        settings: Settings,
    ) -> SoftmaxStats:
        """Return the pass over the items that every sampler needs, with topk's own work in it."""
        if settings.sampler == "topk":
            p, ids, lse, mean = table.topk(h, settings.num_sampled(table.num_items))
            saturated = SaturatedRows.among(h, table, p[:, 0], lse.dtype)
            return cls(h, table, sequence_ids, target, lse, mean, (p, ids), None, saturated)
        lse, mean, ranges = table.mean(h)
        most = (table.largest(ranges) - lse).exp()
        saturated = SaturatedRows.among(h, table, most, lse.dtype)
        return cls(h, table, sequence_ids, target, lse, mean, None, ranges, saturated)

    @property
    def num_items(self) -> int:
        return self.table.num_items

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Probabilities and columns of the k most likely items, (N, k) each."""
        assert self.top is not None and self.top[1].shape[1] == k
        return self.top

    def draw(self, k: int, seed: int) -> Tensor:
        """k draws from each softmax, (N, k) int64."""
        assert self.ranges is not None
        return self.table.draw(self.h, self.lse, self.ranges, self.sequence_ids, k, seed)

    def draw_distinct(self, k: int, seed: int) -> tuple[Tensor, Tensor]:
        """k draws without replacement and their weights, (N, k) each."""
        assert self.ranges is not None
        return self.table.draw_distinct(self.h, self.lse, self.ranges, self.sequence_ids, k, seed)

    def log_probability(self, sequence: Tensor, items: Tensor) -> Tensor:
        """log p of some items of some sequences: (n,) and (n, m) -> (n, m)."""
        vectors, bias = self.table.rows(items)
        z = (self.h[sequence][:, None] * vectors).sum(dim=2)
        if bias is not None:
            z = z + bias
        return z - self.lse[sequence, None]

    def centred(self, sequence: Tensor, items: Tensor) -> Tensor:
        """w_v − w̄ of items (n, m) of sequences (n,): (n, m, D)."""
        vectors = self.table.rows(items)[0].to(self.mean.dtype)
        mean = self.mean[sequence][:, None]
        if self.saturated is None:
            return vectors - mean
        place = self.saturated.place[sequence]
        top = self.table.rows(self.saturated.item[place])[0].to(vectors.dtype)[:, None]
        offset = self.saturated.offset[place][:, None]
        near = ((vectors - top) - offset).to(vectors.dtype)
        return torch.where((place >= 0)[:, None, None], near, vectors - mean)

    def hit_less_p(self, sequence: Tensor, items: Tensor, ids: Tensor) -> Tensor:
        """1[v = y] − p_v of items v (n, m) and y (n, K): (n, m, K)."""
        p = self.log_probability(sequence, items).exp()
        rest = 1 - p
        if self.saturated is not None:
            place = self.saturated.place[sequence]
            top = (items == self.saturated.item[place][:, None]) & (place >= 0)[:, None]
            rest = torch.where(top, self.saturated.rest[place][:, None].to(p.dtype), rest)
        return torch.where(ids[:, None] == items[:, :, None], rest[:, :, None], -p[:, :, None])


def factor_covariance(stats: SoftmaxStats, settings: Settings) -> CovarianceFactor:
    """Return the factor that `settings.sampler` asks for."""
    if settings.sampler == "exact":
        return _exact(stats, settings)
    if settings.sampler == "sketch":
        width = stats.h.shape[1]
        # Positions that share a probe have its signs, which drown what exact directions save.
        if settings.positions != "last":
            return streamed_sketch(stats, settings)
        if stats.num_items * width * (width + 1) // 2 <= _COVARIANCE_LIMIT:
            return _hybrid_sketch(stats, settings)
        return streamed_sketch(stats, settings)
    ids, omega, mass = sample(stats, settings)
    return factor_items(stats, ids, omega, mass)


def add_output_(
    sums: Sequence[Tensor | None], stats: SoftmaxStats, factor: CovarianceFactor, rows: Any
) -> None:
    """Add squares of some rows to the output layer's weight and bias, saturated rows apart."""
    if stats.saturated is not None:
        keep = torch.zeros(len(stats.h), dtype=torch.bool, device=stats.h.device)
        keep[rows] = True
        saturated = stats.saturated.select(keep)
        saturated.add_output_(sums[0], sums[1], factor.ids, factor.omega)
        rows = keep & (saturated.place < 0)
    ids = None if factor.ids is None else factor.ids[rows]
    omega = None if factor.omega is None else factor.omega[rows].to(stats.lse.dtype)
    stats.table.add_square_(sums, stats.h[rows], stats.lse[rows], ids, omega)


def check_softmax(values: Tensor, sequence_ids: Tensor) -> None:
    """Raise InputError unless values (N,), of the softmaxes of `sequence_ids`, are finite."""
    if not bool((fine := values.isfinite()).all()):
        raise InputError(
            f"model: the logits of sequence number {int(sequence_ids[~fine][0])} hold a NaN, an"
            " infinity or nothing but -inf"
        )


class ItemSampler(Protocol):
    """What sampling needs of the softmax of every sequence; see SoftmaxStats for the members."""

    @property
    def sequence_ids(self) -> Tensor: ...
    @property
    def target(self) -> Tensor | None: ...
    @property
    def num_items(self) -> int: ...
    def topk(self, k: int) -> tuple[Tensor, Tensor]: ...
    def draw(self, k: int, seed: int) -> Tensor: ...
    def draw_distinct(self, k: int, seed: int) -> tuple[Tensor, Tensor]: ...
    def log_probability(self, sequence: Tensor, items: Tensor) -> Tensor: ...


def sample(stats: ItemSampler, settings: Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return an item sampler's ids (N, K) int64, weights ω (N, K), captured mass (N,)."""
    n, v = len(stats.sequence_ids), stats.num_items
    k = settings.num_sampled(v)
    if settings.sampler == "topk":
        p, ids = stats.topk(k)
        mass = p.sum(dim=1)
        return ids, p / mass[:, None] if settings.rescale else p, mass
    if settings.sampler == "model" and not settings.replacement:
        return *stats.draw_distinct(min(k, v), settings.seed), None
    if settings.sampler == "model":
        ids = stats.draw(k, settings.seed)
        return ids, torch.full(ids.shape, 1 / k, device=ids.device), None
    if settings.sampler == "random":
        draws = torch.arange(k, device=stats.sequence_ids.device)
        ids = (counter_rng.uniform(settings.seed, stats.sequence_ids, draws) * v).long()
        scale = v / k
    else:
        assert stats.target is not None
        ids, scale = stats.target[:, None], 1.0
        if ((ids < 0) | (ids >= v)).any():
            raise InputError(f"batch: a target is not one of the model's {v} items")
        if settings.weight == "one":
            return ids, torch.ones(ids.shape, device=ids.device), None
    if isinstance(stats, SoftmaxStats):
        stats.table.fetch(ids)
    p = stats.log_probability(torch.arange(n, device=ids.device), ids).exp()
    return ids, p * scale, None


def factor_items(
    stats: SoftmaxStats, ids: Tensor, omega: Tensor, mass: Tensor | None = None
) -> CovarianceFactor:
    """Return the factor of some items of each sequence: ids (N, K), weights ω (N, K), mass (N,)."""
    stats.table.fetch(ids)
    root = omega.to(stats.mean.dtype).sqrt()
    every = torch.arange(len(ids), device=ids.device)
    columns = root[:, :, None] * stats.centred(every, ids)  # (N, K, D)

    def coefficients(sequence: Tensor, items: Tensor) -> Tensor:
        """sqrt(ω_j) (1[v = y_j] − p_v), (n, m, K)."""
        return root[sequence][:, None] * stats.hit_less_p(sequence, items, ids[sequence])

    if ids.shape[1] <= stats.h.shape[1]:
        return CovarianceFactor(
            probes=ids.shape[1],
            probe_vectors=stored_vectors(columns),
            tied_cross_term=coefficients,
            ids=ids,
            omega=omega,
            mass=mass,
        )
    # More columns than dimensions: D probes say the same, so time stops growing with K.
    wide = columns.double()
    lower = cholesky(wide.transpose(1, 2) @ wide, wide.dtype)

    def cross(sequence: Tensor, items: Tensor) -> Tensor:
        return solve_lower(lower[sequence], coefficients(sequence, items) @ columns[sequence])

    return CovarianceFactor(
        probes=lower.shape[2],
        probe_vectors=matrix_vectors(lower, columns.dtype),
        tied_cross_term=cross,
        ids=ids,
        omega=omega,
        mass=mass,
    )


def _all_items_moments(stats: SoftmaxStats, sequence: Tensor, items: Tensor) -> Tensor:
    """m_v = p_v (w_v − w̄), the sum over all items: (n, m, D)."""
    p = stats.log_probability(sequence, items).exp()
    return p[:, :, None] * stats.centred(sequence, items)


def _covariance(stats: SoftmaxStats) -> Tensor:
    found = stats.table.covariance(stats.h, stats.lse, stats.mean)
    if stats.saturated is None:
        return found
    return found.double().index_copy(0, stats.saturated.rows, stats.saturated.covariance())


def _eigen_of_covariance(stats: SoftmaxStats) -> tuple[Tensor, Tensor, Tensor]:
    """(basis, values, trace) of every sequence's C, all D directions or V − 1."""
    rank = min(stats.h.shape[1], max(stats.num_items - 1, 1))
    return eigen(_covariance(stats), stats.mean.dtype, rank)


def _exact(stats: SoftmaxStats, settings: Settings) -> CovarianceFactor:
    if settings.tol is None and settings.probes is None:
        singular = stats.num_items <= stats.h.shape[1]
        return _exact_of_few_items(stats) if singular else _exact_of_all(stats)
    basis, values, trace = _eigen_of_covariance(stats)
    if settings.tol is not None:
        # Per sequence, the fewest directions that leave at most tol of the trace out.
        tail = trace[:, None] - values.cumsum(dim=1)
        needed = (tail > settings.tol * trace[:, None]).sum(dim=1) + 1
        direction = torch.arange(values.shape[1], device=values.device)
        values = values.masked_fill(direction[None] >= needed[:, None], 0.0)
        keep = int(needed.clamp(max=values.shape[1]).max())
        basis, values = basis[:, :, :keep], values[:, :keep]
    if settings.probes is not None:
        basis, values = basis[:, :, : settings.probes], values[:, : settings.probes]

    def cross(sequence: Tensor, items: Tensor) -> Tensor:
        moments = _all_items_moments(stats, sequence, items)
        return project(basis[sequence], values[sequence], moments)

    return CovarianceFactor(
        probes=basis.shape[2],
        probe_vectors=matrix_vectors(basis * values[:, None].sqrt(), stats.mean.dtype),
        tied_cross_term=cross,
        kept=values.sum(dim=1) / trace.clamp(min=torch.finfo(trace.dtype).tiny),
    )


def _exact_of_all(stats: SoftmaxStats) -> CovarianceFactor:
    """Return Cholesky factors: any L with L Lᵀ = C serves where no direction is dropped."""
    lower = cholesky(_covariance(stats), stats.mean.dtype)

    def cross(sequence: Tensor, items: Tensor) -> Tensor:
        return solve_lower(lower[sequence], _all_items_moments(stats, sequence, items))

    return CovarianceFactor(
        probes=lower.shape[2],
        probe_vectors=matrix_vectors(lower, stats.mean.dtype),
        tied_cross_term=cross,
        kept=torch.ones_like(lower[:, 0, 0]),
    )


def _exact_of_few_items(stats: SoftmaxStats) -> CovarianceFactor:
    """V − 1 columns where V <= D and C is singular: L = Wᵀ M with M Mᵀ = diag(p) − p pᵀ.

    M (V, V − 1) in closed form (Tanabe and Sagae, J. R. Statist. Soc. B 54, 1992): with
    tails q_j = Σ_{i > j} p_i, column j is sqrt(p_j q_j / q_{j−1}) times 1 at j and −p_i / q_j
    at every i > j. m_v = Wᵀ (diag(p) − p pᵀ) e_v = L Mᵀ e_v, so β_v is row v of M.
    """
    items = torch.arange(stats.num_items, device=stats.h.device)
    stats.table.fetch(items)
    every = items.expand(len(stats.h), -1)
    sequence = torch.arange(len(stats.h), device=stats.h.device)
    p = stats.log_probability(sequence, every).exp().double()
    if p.shape[1] == 1:
        root = p.new_zeros(len(p), 1, 1)
    else:
        tail = p.flip(1).cumsum(1).flip(1)  # from j on
        after = tail[:, 1:]
        tiny = torch.finfo(p.dtype).tiny
        root = (-p[:, :, None] / after[:, None].clamp(min=tiny)).tril(-1)
        root.diagonal(dim1=1, dim2=2).fill_(1.0)
        scale = p[:, :-1] * (after / tail[:, :-1].clamp(min=tiny))
        root *= scale.sqrt()[:, None]
    # Differences to w̄ leave L as it is, its columns' coefficients summing to 0, and cancel less.
    centred = stats.table.rows(items)[0].double() - stats.mean.double()[:, None]
    return CovarianceFactor(
        probes=root.shape[2],
        probe_vectors=matrix_vectors(centred.transpose(1, 2) @ root, stats.mean.dtype),
        tied_cross_term=lambda sequence, items: root[sequence[:, None], items],
        kept=torch.ones_like(root[:, 0, 0]),
    )


def _hybrid_sketch(stats: SoftmaxStats, settings: Settings) -> CovarianceFactor:
    """Return the top directions of C kept exactly, the rest sketched in C's own eigenbasis.

    The remaining directions are dealt into buckets and summed with random signs, as
    `softmax_sketch` does with items: the same expectation, with less to be random about.
    """
    assert settings.probes is not None
    basis, values, _ = _eigen_of_covariance(stats)
    if settings.probes >= basis.shape[2]:
        top, sketched = basis.shape[2], 0
    else:
        top = settings.probes // 2
        sketched = settings.probes - top
    rest = torch.arange(basis.shape[2] - top, device=basis.device)
    signs = counter_rng.apply_random_signs_(
        basis.new_ones(len(basis), len(rest)), settings.seed, stats.sequence_ids, rest
    )
    bucket = counter_rng.bucket_of(settings.seed, rest, max(sketched, 1))
    # A product with the buckets' indicators: a scattered sum has no fixed order on a GPU.
    dealing = torch.nn.functional.one_hot(bucket, max(sketched, 1))[:, :sketched].to(basis.dtype)
    scaled = basis * values[:, None].sqrt()
    dealt = (scaled[:, :, top:] * signs[:, None]) @ dealing
    columns = torch.cat([scaled[:, :, :top], dealt], dim=2)

    def cross(sequence: Tensor, items: Tensor) -> Tensor:
        moments = _all_items_moments(stats, sequence, items)
        alpha = project(basis[sequence], values[sequence], moments)
        beta = (alpha[:, :, top:] * signs[sequence][:, None]) @ dealing
        return torch.cat([alpha[:, :, :top], beta], dim=2)

    return CovarianceFactor(
        probes=top + sketched,
        probe_vectors=matrix_vectors(columns, stats.mean.dtype),
        tied_cross_term=cross,
    )
