"""PCRec's layer-wise mix: the member whose layer carries more information counts more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from fisherkern.members.layers import entropy, histogram, over_layers
from fisherkern.members.options import Integer, Number
from fisherkern.merging.rules.base import MergeBlock, TensorBlocks, convex, merge_method


def layer_criteria(
    tensors: Mapping[str, TensorBlocks], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return (M,) per tensor: H_m of the layer that it belongs to."""
    measure = _entropies if options["criterion"] == "entropy" else _l1_shares
    own = {n: measure(b, options["bins"]) for n, b in tensors.items() if len(b.shape) >= 2}
    members = next((blocks.members for blocks in tensors.values()), 0)
    return over_layers(tensors, own, torch.zeros(members, dtype=torch.float64))


def _entropies(blocks: TensorBlocks, bins: int) -> Tensor:
    low = torch.full((blocks.members,), torch.inf, dtype=torch.float64)
    high = -low
    for x in blocks:
        low = low.minimum(torch.where(x.owns, x.theta, torch.inf).amin((1, 2)).cpu())
        high = high.maximum(torch.where(x.owns, x.theta, -torch.inf).amax((1, 2)).cpu())
    counts = torch.zeros(blocks.members, bins, dtype=torch.float64)
    for x in blocks:
        for m in range(blocks.members):
            own = x.theta[m][x.owns[m][:, 0]].cpu()
            counts[m] += histogram(own, low[m], high[m], bins)
    return entropy(counts)


def _l1_shares(blocks: TensorBlocks, bins: int) -> Tensor:
    total = torch.zeros(blocks.members, dtype=torch.float64)
    for x in blocks:
        total += x.theta.abs().sum((1, 2)).cpu()
    return total / total.sum().clamp(min=torch.finfo(torch.float64).tiny)


@merge_method(
    "pcrec",
    title="PCRec's layer-wise mix",
    source="https://arxiv.org/abs/2111.00429",
    takes=("weights",),
    prepare=layer_criteria,
)
def pcrec(
    block: MergeBlock,
    *,
    criterion: Literal["entropy", "l1"] = "entropy",
    alpha: Annotated[float, Number(0.0)] = 30.0,
    bins: Annotated[int, Integer(1)] = 10,
) -> Tensor:
    """Return the members mixed layer by layer; a layer with more information counts more.

        theta* = sum_m mu_m theta_m,  mu_m = lambda_m exp(alpha H_m) / sum_l lambda_l exp(alpha H_l)

    For two equal lambdas that is mu_0 = sigmoid(alpha (H_0 - H_1)). H_m (option "criterion") is
    "entropy": -sum_b p_b log p_b over `bins` bins of equal width between the layer's smallest and
    largest weight; or "l1": |W_m|_1 / sum_l |W_l|_1. `over_layers` says what a layer is.
    Source: Sun et al., PCRec, arXiv 2111.00429, where it runs after every epoch of training.
    Its authors' histogram loses the largest weight; here it is in the last bin.
    """
    exponent = block.stats.to(block.theta.device)[:, None, None] * alpha
    # Less the largest of the owners', so that exp cannot overflow and one of them keeps a share.
    owners = torch.where(block.weights > 0, exponent, -torch.inf)
    return convex(block.theta, block.weights * (owners - owners.amax(0)).exp())
