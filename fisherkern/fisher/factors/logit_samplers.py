"""The samplers for a model known by its logits alone.

With z for h and the identity for W the same mathematics
holds: probes are sqrt(ω_y) (e_y − p) in the space of the logits, the output layer is
part of what the probes run through, and there is nothing tied left to add. It costs
the N×V logits that the model makes anyway, and in `exact` mode V backward passes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fisherkern.fisher.factors.factor import CovarianceFactor
from fisherkern.fisher.factors.samplers import sample
from fisherkern.fisher.factors.saturated import complement
from fisherkern.fisher.settings import Settings
from fisherkern.ops import counter_rng
from fisherkern.ops.sample_distinct import distinct_from_ranges
from fisherkern.ops.softmax_lse import RANGE


@dataclasses.dataclass(frozen=True)
class LogitStats:
    """Log-probabilities (N, V), sequence ids (N,) and, for sampler="target", columns (N,)."""

    log_p: Tensor
    sequence_ids: Tensor
    target: Tensor | None

    @property
    def num_items(self) -> int:
        return self.log_p.shape[1]

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        values, ids = torch.topk(self.log_p, k, dim=1)
        return values.exp(), ids

    def draw(self, k: int, seed: int) -> Tensor:
        u = counter_rng.uniform(
            seed, self.sequence_ids, torch.arange(k, device=self.sequence_ids.device)
        )
        cdf = self.log_p.double().exp().cumsum(dim=1)
        return torch.searchsorted(cdf, u, right=True).clamp_(max=self.num_items - 1)

    def draw_distinct(self, k: int, seed: int) -> tuple[Tensor, Tensor]:
        if k == self.num_items:
            items = torch.arange(k, device=self.log_p.device)
            return items.expand(len(self.log_p), -1), self.log_p.exp()
        missing = -self.num_items % RANGE
        padded = torch.nn.functional.pad(self.log_p.double(), (0, missing), value=-torch.inf)
        ranges: Tensor = padded.unflatten(1, (-1, RANGE))

        def log_p_of(parts: Tensor) -> Tensor:
            return ranges.gather(1, parts[:, :, None].expand(-1, -1, RANGE))

        log_mass = ranges.logsumexp(dim=2)
        ids, omega = distinct_from_ranges(
            log_mass, log_p_of, self.sequence_ids, self.num_items, k, seed
        )
        return ids, omega.to(self.log_p.dtype)

    def log_probability(self, sequence: Tensor, items: Tensor) -> Tensor:
        return self.log_p[sequence[:, None], items]


def factor_logits(stats: LogitStats, settings: Settings) -> CovarianceFactor:
    """Return the factor that `settings.sampler` asks for; its columns are over the V logits."""
    if settings.sampler == "sketch":
        return _sketch(stats.log_p.exp(), stats, settings)
    if settings.sampler == "exact":
        return factor_logit_items(stats, None, stats.log_p.exp())
    return factor_logit_items(stats, *sample(stats, settings))


def factor_logit_items(
    stats: LogitStats, ids: Tensor | None, omega: Tensor, mass: Tensor | None = None
) -> CovarianceFactor:
    """Return the factor of items of each sequence: ids (N, K), None for all, ω (N, K)."""
    p = stats.log_p.exp()
    rest, omega = complement(p), omega.to(p.dtype)
    probes = omega.shape[1]

    def columns(sequence: Tensor, span: slice) -> Tensor:
        root = omega[sequence, span].sqrt().t()[:, :, None]
        items = torch.arange(probes, device=p.device)[span].expand(len(sequence), -1)
        if ids is not None:
            items = ids[sequence, span]
        place = items.t()[:, :, None]
        own = root * rest[sequence].expand(len(root), -1, -1).gather(2, place)
        return (-root * p[sequence]).scatter_(2, place, own)

    return CovarianceFactor(
        probes=probes, probe_vectors=columns, tied_cross_term=_no_cross, mass=mass
    )


def _sketch(p: Tensor, stats: LogitStats, settings: Settings) -> CovarianceFactor:
    assert settings.probes is not None
    probes, items = settings.probes, torch.arange(stats.num_items, device=p.device)
    rest = complement(p)
    signed = counter_rng.apply_random_signs_(p.sqrt(), settings.seed, stats.sequence_ids, items)
    bucket = counter_rng.bucket_of(settings.seed, items, probes)

    def columns(sequence: Tensor, span: slice) -> Tensor:
        probe = torch.arange(probes, device=p.device)[span]
        signs = signed[sequence] * (bucket == probe[:, None])[:, None]
        # s_v (1 − p_v) − p_v Σ_{u≠v} s_u: of an item with nearly all the mass nothing cancels.
        large = p[sequence] > 0.5
        top = signs.masked_fill(~large, 0.0)
        others = (signs - top).sum(dim=2, keepdim=True)
        total = others + top.sum(dim=2, keepdim=True)
        apart = signs * rest[sequence] - p[sequence] * others
        return torch.where(large, apart, signs - p[sequence] * total)

    return CovarianceFactor(probes=probes, probe_vectors=columns, tied_cross_term=_no_cross)


def _no_cross(sequence: Tensor, items: Tensor) -> Tensor:
    raise AssertionError("in logit space the output layer is inside the encoder")
