"""The Fisher-weighted average, entry by entry or with Fishers shared by groups of entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.merging.rules.average import average
from fisherkern.merging.rules.base import MergeBlock, TensorBlocks, convex, merge_method


def group_means(
    tensors: Mapping[str, TensorBlocks], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return (M, rows or 1, columns or 1) per tensor: the mean of each entry's group.

    Nothing for "entry" and "row", which need no whole tensors, and where there is no Fisher.
    """
    group = options["group"]
    if group in ("entry", "row"):
        return {}
    if group == "tensor":
        sums = _sums(tensors, dim=None)
        return {name: (total / count)[:, :, None] for name, (total, count) in sums.items()}
    sums = _sums(tensors, dim=0)
    found = {name: _neuron_means(name, sums)[:, :, None] for name in sums}
    if group == "head":
        found.update(_head_means(tensors))
    return found


Sums = dict[str, tuple[Tensor, float]]


def _sums(tensors: Mapping[str, TensorBlocks], dim: int | None) -> Sums:
    """Return (M, n) sums of every Fisher, and the number of entries of each sum.

    Over all but dimension `dim` of a tensor's table; None: over everything, n = 1.
    """
    found: Sums = {}
    for name, blocks in tensors.items():
        parts, count = [], 0
        for x in blocks:
            if x.fisher is None:
                break
            count += x.fisher[0].numel()
            parts.append(x.fisher.sum(2) if dim == 0 else x.fisher.sum(1))
        if parts:
            total = torch.cat(parts, 1) if dim == 0 else torch.stack(parts).sum(0)
            total = total.sum(1, keepdim=True) if dim is None else total
            found[name] = total, count / total.shape[1]
    return found


def _neuron_means(name: str, sums: Sums) -> Tensor:
    """(M, rows) means over the rows of a weight and a bias of one module, or of a tensor alone."""
    module = name.rpartition(".")[0]
    pair = [f"{module}.weight", f"{module}.bias"]
    kin = [sums[other] for other in pair if name in pair and other in sums]
    if len({total.shape for total, _ in kin}) != 1:
        kin = [sums[name]]
    return torch.stack([total for total, _ in kin]).sum(0) / sum(width for _, width in kin)


def _head_means(tensors: Mapping[str, TensorBlocks]) -> dict[str, Tensor]:
    """Return the tensors that belong to attention heads."""
    kin: dict[str, dict[str, tuple[Tensor, float, int]]] = {}
    for name, blocks in tensors.items():
        if blocks.heads is None:
            continue
        attention, number, dim = blocks.heads
        for total, count in _sums({name: blocks}, dim).values():
            by_head = total.unflatten(1, (number, -1))
            kin.setdefault(attention, {})[name] = by_head.sum(2), count * by_head.shape[2], dim
    if not kin:
        raise InputError(
            "option 'group' is 'head', but no attention heads are known of the members"
        )
    found = {}
    for own in kin.values():
        total = torch.stack([sums for sums, _, _ in own.values()]).sum(0)
        means = total / sum(count for _, count, _ in own.values())
        for name, (_, _, dim) in own.items():
            size = tensors[name].shape[dim]
            wide = means.repeat_interleave(size // means.shape[1], dim=1)
            found[name] = wide[:, :, None] if dim == 0 else wide[:, None, :]
    return found


@merge_method(
    "fisher",
    title="Fisher-weighted average",
    source="https://arxiv.org/abs/2111.09832",
    needs=("fishers",),
    takes=("weights",),
    prepare=group_means,
)
def fisher_average(
    block: MergeBlock, *, group: Literal["entry", "row", "neuron", "head", "tensor"] = "entry"
) -> Tensor:
    """Return theta* = sum_m lambda_m (F_m + floor) theta_m / sum_m lambda_m (F_m + floor).

    Where the denominator is 0 (floor 0 and no information), or there is no Fisher: `average`.
    With the option "group", F_m is first replaced by its mean over the entry's group, which
    costs one number per group: "row" (an item's row, the weights into a neuron), "neuron" (those
    and the neuron's bias, of one module), "head" (all an attention head's queries, keys, values
    and outputs; neurons elsewhere) or "tensor".
    Source: Matena and Raffel, arXiv 2111.09832, with a floor that is relative to the mean;
    the groups after Fisher mask nodes, arXiv 2403.09891.
    """
    if block.fisher is None:
        return average(block)
    fisher = block.fisher
    if group == "row":
        fisher = fisher.mean(2, keepdim=True)
    elif group != "entry":
        means = block.stats.to(fisher.device)
        rows = slice(block.start, block.start + fisher.shape[1])
        fisher = means[:, rows] if means.shape[1] > 1 else means
    share = (block.weights * (fisher + block.floor)).expand_as(block.theta)
    share = torch.where(share.sum(0) > 0, share, block.weights)
    return convex(block.theta, share)
