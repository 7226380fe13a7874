"""TIES: task vectors trimmed, and averaged where their signs agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from fisherkern.members.options import Number
from fisherkern.merging.rules.base import MergeBlock, TensorBlocks, merge_method
from fisherkern.merging.rules.task_vectors import from_base

# Bits counted in one pass of `_thresholds`.
DIGIT = 16


def trim_thresholds(
    tensors: Mapping[str, TensorBlocks], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return (M,) per tensor: the magnitude of the last entry of each member that `ties` keeps."""
    density = options["density"]
    if options["per"] == "tensor":
        return {name: _thresholds([blocks], density) for name, blocks in tensors.items()}
    common = _thresholds(list(tensors.values()), density)
    return dict.fromkeys(tensors, common)


@merge_method(
    "ties",
    title="TIES",
    source="https://arxiv.org/abs/2306.01708",
    needs=("base",),
    takes=("weights",),
    prepare=trim_thresholds,
)
def ties(
    block: MergeBlock,
    *,
    density: Annotated[float, Number(0.0, 1.0, above=True)] = 0.2,
    scale: Annotated[float, Number(0.0)] = 1.0,
    per: Literal["model", "tensor"] = "model",
) -> Tensor:
    """Trim, elect the sign, and average the members that agree.

        tau^_m = tau_m where |tau_m| is among the member's largest `density`, else 0
        g = sign(sum_m lambda_m tau^_m)
        theta* = theta_0 + scale sum_{m in A} lambda_m tau^_m / sum_{m in A} lambda_m,
        A = {m : sign(tau^_m) = g, g != 0};  theta_0 where A is empty

    "Largest" is over the whole vector (option per="model", as in the paper) or each tensor
    (per="tensor"); entries equal to the last one kept are kept too, and rows the member or the
    base lacks do not count. Source: Yadav et al., arXiv 2306.01708, lambda equal there.
    """
    assert block.base is not None
    tau = torch.where(block.owns & block.base_owns, block.theta - block.base, 0.0)
    tau = torch.where(tau.abs() >= block.stats[:, None, None].to(tau.device), tau, 0.0)
    sign = (block.weights * tau).sum(0).sign()
    agrees = (tau.sign() == sign) & (sign != 0)
    share = torch.where(agrees, block.weights, 0.0)
    total = share.sum(0)
    share = torch.where(total > 0, share / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    return from_base(block, scale * share)


def _thresholds(group: list[TensorBlocks], density: float) -> Tensor:
    """Return the k-th largest |tau| of every member over a `group`, k its density of entries.

    Exact for any number of entries and without a copy of them: non-negative float64 numbers
    are ordered as their bits, so four passes that count one digit of 16 bits each find it.
    (`torch.quantile` refuses more than 16.8 million entries.)
    """
    members = group[0].members
    prefix = torch.zeros(members, dtype=torch.int64)
    rank = torch.zeros(members, dtype=torch.int64)
    for shift in (48, 32, 16, 0):
        counts = torch.zeros(members, 1 << DIGIT, dtype=torch.int64)
        for member, bits in _magnitude_bits(group):
            high = bits >> shift >> DIGIT if shift < 48 else torch.zeros_like(bits)
            digit = (bits >> shift)[high == prefix[member]] & ((1 << DIGIT) - 1)
            counts[member] += torch.bincount(digit, minlength=1 << DIGIT)
        if shift == 48:
            # The number kept: at least one, at most all.
            rank = (density * counts.sum(1)).round().long().clamp(min=1)
        from_top = counts.flip(1).cumsum(1)
        place = (from_top < rank[:, None]).sum(1).clamp(max=(1 << DIGIT) - 1)
        rank = rank - (from_top - counts.flip(1)).gather(1, place[:, None])[:, 0]
        prefix = (prefix << DIGIT) | ((1 << DIGIT) - 1 - place)
    return prefix.view(torch.float64)


def _magnitude_bits(group: list[TensorBlocks]) -> Iterable[tuple[int, Tensor]]:
    """(member, bits of |tau| as int64) of every block, rows that member and base both have."""
    for blocks in group:
        for x in blocks:
            assert x.base is not None
            for member in range(x.members):
                have = (x.owns[member] & x.base_owns)[:, 0]
                tau = (x.theta[member] - x.base)[have].abs().flatten()
                yield member, tau.cpu().view(torch.int64)
