"""The paper's batch-wise estimator, kept for comparison only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.adapters.parameters import Parameters
from fisherkern.fisher.factors.logit_samplers import LogitStats
from fisherkern.fisher.factors.samplers import check_softmax, sample
from fisherkern.fisher.settings import Settings


def add_batchwise_(
    fisher: dict[str, Tensor],
    model: ModelAdapter,
    parameters: Parameters,
    settings: Settings,
    batch: Any,
    sequence_ids: Tensor,
) -> tuple[set[str], Tensor | None]:
    """fisher += Σ_j (Σ_i ω_ij) (∂/∂θ Σ_i log p_i(y_ij))² over a batch's sequences i and ranks j.

    The paper's eq. 6. The square comes after the sum over the batch, so the cross
    terms of different sequences stay in and the scale grows with the batch: it is
    the Fisher only for batches of one sequence. Returns the names that received a
    gradient and the captured mass (N,).
    """
    with torch.enable_grad():
        logits = model.logits(batch)
        log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1)
    target = model.targets(batch) if settings.sampler == "target" else None
    stats = LogitStats(log_p.detach(), sequence_ids, target)
    check_softmax(stats.log_p.amax(dim=1), sequence_ids)
    ids, omega, mass = sample(stats, settings)
    names, tensors = list(parameters.named), list(parameters.named.values())
    reached = set()
    for j in range(ids.shape[1]):
        gradients = torch.autograd.grad(
            log_p.gather(1, ids[:, j : j + 1]).sum(),
            tensors,
            retain_graph=j + 1 < ids.shape[1],
            allow_unused=True,
        )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                reached.add(name)
                square = gradient.to_dense().to(fisher[name].dtype).square().flatten()
                fisher[name] += omega[:, j].sum().to(square.dtype) * square
    return reached, mass
