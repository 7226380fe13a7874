"""The diagonal Fisher by its definition, over every item, with nothing of fisherkern."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Fisher = dict[str, Tensor]


def fishers_by_definition(
    module: nn.Module,
    logits: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    k: int,
) -> dict[str, Fisher]:
    """(1/N) Σ_i Σ_y ω_i(y) (∂ log p_i(y) / ∂θ)², one backward pass per sequence and item.

    Args:
        module: the bare network, in eval mode.
        logits: (module, batch) -> (N, columns).
        batches: native batches.
        k: items of "topk".

    Returns:
        By sampler, "exact" (ω = p) and "topk" (p of the k most likely, else 0), then by
        parameter.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    sums = {
        sampler: {name: torch.zeros_like(p) for name, p in named.items()}
        for sampler in ("exact", "topk")
    }
    count = 0
    for batch in batches:
        log_p = torch.log_softmax(logits(module, batch), dim=1)
        omega = log_p.detach().exp()
        top = torch.zeros_like(omega).scatter(1, omega.topk(k, dim=1).indices, 1.0) * omega
        count += len(log_p)
        for i, y in torch.cartesian_prod(*map(torch.arange, log_p.shape)).tolist():
            gradients = torch.autograd.grad(
                log_p[i, y], list(named.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    square = gradient.square()
                    sums["exact"][name].add_(square, alpha=float(omega[i, y]))
                    sums["topk"][name].add_(square, alpha=float(top[i, y]))
    return {s: {name: f / count for name, f in fisher.items()} for s, fisher in sums.items()}


def worst(found: Any, expected: Fisher) -> tuple[float, str]:
    """The largest difference of a tensor over its largest entry, and the tensor's name.

    Infinite where the names differ. A tensor whose Fisher is exactly 0 counts by what was found.
    """
    if set(found) != set(expected):
        return float("inf"), ", ".join(sorted(set(found) ^ set(expected))[:3])
    largest = max(float(f.abs().max()) for f in expected.values())
    errors = {}
    for name, right in expected.items():
        scale = float(right.abs().max())
        difference = float((found[name].to(right.dtype) - right).abs().max())
        # Keys' biases of attention have no Fisher: what is left there is rounding.
        errors[name] = difference / (scale if scale > 1e-12 * largest else largest)
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def average_by_definition(members: Sequence[Fisher], fishers: Sequence[Fisher]) -> Fisher:
    """Σ_m (F_m / u_m + 0.1) θ_m / Σ_m (F_m / u_m + 0.1), u_m the mean of all entries of F_m."""
    units = [
        sum(float(f.sum()) for f in fisher.values()) / sum(f.numel() for f in fisher.values())
        for fisher in fishers
    ]
    merged = {}
    for name in members[0]:
        weights = [f[name] / u + 0.1 for f, u in zip(fishers, units, strict=True)]
        terms = [w * member[name] for w, member in zip(weights, members, strict=True)]
        merged[name] = torch.stack(terms).sum(0) / torch.stack(weights).sum(0)
    return merged
