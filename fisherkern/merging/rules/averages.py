"""Averages of the members, entry by entry, and with Fishers shared by groups of entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern.merging.rules.base import Blocks, Operands, average, convex


def fisher_average(x: Operands) -> Tensor:
    """theta* = sum_m lambda_m (F_m + floor) theta_m / sum_m lambda_m (F_m + floor).

    Where the denominator is 0 (floor 0 and no information), or there is no Fisher: `average`.
    With the option "group", F_m is first replaced by its mean over the entry's group, which
    costs one number per group: "row" (an item's row, the weights into a neuron), "neuron" (those
    and the neuron's bias, of one module) or "tensor".
    Source: Matena and Raffel, arXiv 2111.09832, with a floor that is relative to the mean;
    the groups after Fisher mask nodes, arXiv 2403.09891.
    """
    if x.fisher is None:
        return average(x)
    fisher = x.fisher
    group = x.options.get("group", "entry")
    if group == "row":
        fisher = fisher.mean(2, keepdim=True)
    elif group == "neuron":
        fisher = x.stats[:, x.start : x.start + fisher.shape[1], None].to(fisher.device)
    elif group == "tensor":
        fisher = x.stats[:, None, None].to(fisher.device)
    share = (x.weights * (fisher + x.floor)).expand_as(x.theta)
    share = torch.where(share.sum(0) > 0, share, x.weights)
    return convex(x.theta, share)


def group_means(tensors: Mapping[str, Blocks], options: Mapping[str, Any]) -> dict[str, Any]:
    """What "neuron" (M, rows) and "tensor" (M,) need of whole tensors; nothing for the others."""
    if options["group"] == "tensor":
        return {name: _tensor_means(blocks) for name, blocks in tensors.items()}
    if options["group"] != "neuron":
        return {}
    sums = {}
    for name, blocks in tensors.items():
        found = _row_sums(blocks)
        if found is not None:
            sums[name] = found
    return {name: _neuron_means(name, sums) for name in sums}


def _neuron_means(name: str, sums: Mapping[str, tuple[Tensor, int]]) -> Tensor:
    """(M, rows) means over the rows of a weight and a bias of one module, or of a tensor alone."""
    module = name.rpartition(".")[0]
    pair = [f"{module}.weight", f"{module}.bias"]
    kin = [sums[other] for other in pair if name in pair and other in sums]
    if len({total.shape for total, _ in kin}) != 1:
        kin = [sums[name]]
    return torch.stack([total for total, _ in kin]).sum(0) / sum(width for _, width in kin)


def _row_sums(blocks: Blocks) -> tuple[Tensor, int] | None:
    """(M, rows) sums over the columns and the number of columns; None without a Fisher."""
    rows, width = [], 1
    for x in blocks:
        if x.fisher is None:
            return None
        rows.append(x.fisher.sum(2))
        width = x.fisher.shape[2]
    return (torch.cat(rows, 1), width) if rows else None


def _tensor_means(blocks: Blocks) -> Tensor | None:
    """(M,) the mean over the entries each member owns."""
    total, count = torch.zeros(blocks.members), torch.zeros(blocks.members)
    total, count = total.double(), count.double()
    for x in blocks:
        if x.fisher is None:
            return None
        total += x.fisher.sum((1, 2)).cpu()
        count += x.owns.sum((1, 2)).cpu() * x.fisher.shape[2]
    return total / count.clamp(min=1)
