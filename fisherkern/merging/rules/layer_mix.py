"""PCRec's layer-wise mix: the member whose layer carries more information counts more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern.merging.rules.base import Blocks, Operands, convex


def layer_mix(x: Operands) -> Tensor:
    """theta* = sum_m mu_m theta_m, mu_m = lambda_m exp(alpha H_m) / sum_l lambda_l exp(alpha H_l)

    per layer, which for two equal lambdas is mu_0 = sigmoid(alpha (H_0 - H_1)). H_m (option
    "criterion") is "entropy": -sum_b p_b log p_b over `bins` bins of equal width between the
    layer's smallest and largest weight; or "l1": |W_m|_1 / sum_l |W_l|_1. A layer is a tensor of
    two dimensions or more and the vectors (biases, norms) after it, up to the next; vectors
    before the first matrix go with it.
    Source: Sun et al., PCRec, arXiv 2111.00429, where it runs after every epoch of training.
    Its authors' histogram loses the largest weight; here it is in the last bin.
    """
    criterion = x.stats.to(x.theta.device)[:, None, None] * x.options["alpha"]
    # Less the largest of the owners', so that exp cannot overflow and one of them keeps a share.
    owners = torch.where(x.weights > 0, criterion, -torch.inf)
    return convex(x.theta, x.weights * (owners - owners.amax(0)).exp())


def layer_criteria(tensors: Mapping[str, Blocks], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """(M,) per tensor: H_m of the layer it belongs to."""
    measure = _entropies if options["criterion"] == "entropy" else _l1_shares
    own = {n: measure(b, options["bins"]) for n, b in tensors.items() if len(b.shape) >= 2}
    found, current = {}, next(iter(own.values()), None)
    for name, blocks in tensors.items():
        current = own.get(name, current)
        found[name] = torch.zeros(blocks.members).double() if current is None else current
    return found


def _entropies(blocks: Blocks, bins: int) -> Tensor:
    low = torch.full((blocks.members,), torch.inf, dtype=torch.float64)
    high = -low
    for x in blocks:
        low = low.minimum(torch.where(x.owns, x.theta, torch.inf).amin((1, 2)).cpu())
        high = high.maximum(torch.where(x.owns, x.theta, -torch.inf).amax((1, 2)).cpu())
    counts = torch.zeros(blocks.members, bins, dtype=torch.float64)
    width = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    for x in blocks:
        for m in range(blocks.members):
            own = x.theta[m][x.owns[m][:, 0]].cpu()
            bin_ = ((own - low[m]) / width[m] * bins).long().clamp(max=bins - 1).flatten()
            counts[m] += torch.bincount(bin_, minlength=bins)
    p = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return -torch.xlogy(p, p).sum(1)


def _l1_shares(blocks: Blocks, bins: int) -> Tensor:
    total = torch.zeros(blocks.members, dtype=torch.float64)
    for x in blocks:
        total += x.theta.abs().sum((1, 2)).cpu()
    return total / total.sum().clamp(min=torch.finfo(torch.float64).tiny)
