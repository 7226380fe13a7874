"""The samplers for a model known by its logits alone.

With z in the place of h and the identity in the place of W the same mathematics
holds: probes are sqrt(ω_y) (e_y − p) in the space of the logits, the output layer is
part of what the probes run through, and there is nothing tied left to add. It costs
the N×V logits that the model makes anyway, and in `exact` mode V backward passes.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fisherkern.fisher.samplers import Factor, Settings, sample
from fisherkern.ops import counter


@dataclasses.dataclass(frozen=True)
class LogitRows:
    """Log-probabilities (N, V), sequence numbers (N,) and, for sampler="target", columns (N,)."""

    log_p: Tensor
    number: Tensor
    target: Tensor | None

    @property
    def num_items(self) -> int:
        return self.log_p.shape[1]

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        values, ids = torch.topk(self.log_p, k, dim=1)
        return values.exp(), ids

    def draw(self, k: int, seed: int) -> Tensor:
        u = counter.uniform(seed, self.number, torch.arange(k, device=self.number.device))
        cdf = self.log_p.double().exp().cumsum(dim=1)
        return torch.searchsorted(cdf, u, right=True).clamp_(max=self.num_items - 1)

    def log_probability(self, sequence: Tensor, item: Tensor) -> Tensor:
        return self.log_p[sequence, item]


def factorise_logits(rows: LogitRows, settings: Settings) -> Factor:
    """The factor that `settings.sampler` asks for; its columns are (N, V)."""
    p = rows.log_p.exp()
    if settings.sampler == "sketch":
        return _sketch(p, rows, settings)
    ids: Tensor | None
    if settings.sampler == "exact":
        ids, omega, mass = None, p, None
        probes = rows.num_items
    else:
        ids, omega, mass = sample(rows, settings)
        probes = ids.shape[1]
    omega = omega.to(p.dtype)

    def column(r: int) -> Tensor:
        root = omega[:, r : r + 1].sqrt()
        item = torch.full_like(rows.number, r) if ids is None else ids[:, r]
        return (-root * p).scatter_add_(1, item[:, None], root)

    return Factor(probes=probes, column=column, cross=_no_cross, mass=mass)


def _sketch(p: Tensor, rows: LogitRows, settings: Settings) -> Factor:
    assert settings.probes is not None
    items = torch.arange(rows.num_items, device=p.device)
    bits = counter.random_bits(settings.seed, rows.number, items)
    scale = 1 / math.sqrt(settings.probes)

    def column(r: int) -> Tensor:
        signed = p.sqrt() * counter.signs(bits, r, p.dtype)
        return (signed - p * signed.sum(dim=1, keepdim=True)) * scale

    return Factor(probes=settings.probes, column=column, cross=_no_cross)


def _no_cross(sequence: Tensor, item: Tensor) -> Tensor:
    raise AssertionError("in logit space the output layer is inside the encoder")
