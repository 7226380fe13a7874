"""Rules on task vectors tau_m = theta_m - theta_0, the members' ways from a common base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern.merging.rules.base import Blocks, Operands, average
from fisherkern.ops import counter_rng


def from_base(x: Operands, share: Tensor) -> Tensor:
    """theta_0 + sum_m share_m (theta_m - theta_0), share (M, n, c) non-negative.

    A row the base lacks has no task vector: its owners are averaged by lambda. Where the shares
    sum to at most 1 this is a convex combination with the base and held within it, as in
    `convex`; a member whose share is 1 comes back bit for bit.
    """
    base = x.base
    assert base is not None
    share = torch.where(x.owns, share, 0.0).expand_as(x.theta)
    total = share.sum(0)
    merged = base + (share * (x.theta - base)).sum(0)
    # Rounding in shares that sum to 1 is no share of the base's.
    rest = total < 1 - 1e-12
    used = share > 0
    low = torch.where(used, x.theta, torch.inf).amin(0)
    high = torch.where(used, x.theta, -torch.inf).amax(0)
    low = torch.where(rest, torch.minimum(low, base), low)
    high = torch.where(rest, torch.maximum(high, base), high)
    merged = torch.where(total > 1 + 1e-12, merged, merged.clamp(low, high))
    return torch.where(x.base_owns, merged, average(x))


def relative(x: Operands) -> Tensor:
    """(M, 1, 1) lambda in units of 1/M: 1 each where the members count alike."""
    return x.lam[:, None, None] * x.members


def task_arithmetic(x: Operands) -> Tensor:
    """theta* = theta_0 + scale sum_m (M lambda_m) tau_m.

    Source: Ilharco et al., arXiv 2212.04089; lambda equal there.
    """
    return from_base(x, x.options["scale"] * relative(x))


def dare(x: Operands) -> Tensor:
    """theta* = theta_0 + scale sum_m (M lambda_m) b_m tau_m / density, b_m ~ Bernoulli(density).

    An entry's draw depends on the seed, the tensor's name, the member's number and the entry's
    place, not on blocks or device. Source: Yu et al., arXiv 2311.03099; density is 1 minus
    their drop rate.
    """
    density = x.options["density"]
    n, width = x.theta.shape[1:]
    device = x.theta.device
    rows = torch.arange(x.start, x.start + n, device=device)
    columns = torch.arange(width, device=device)
    key = x.seed ^ int.from_bytes(_digest(x.name), "little")
    kept = torch.stack(
        [counter_rng.uniform(key + member, rows, columns) < density for member in range(x.members)]
    )
    return from_base(x, x.options["scale"] * relative(x) * kept / density)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()[:7]


def ties(x: Operands) -> Tensor:
    """Trim, elect the sign, average those that agree:

        tau^_m = tau_m where |tau_m| is among the member's largest `density`, else 0
        g = sign(sum_m lambda_m tau^_m)
        theta* = theta_0 + scale sum_{m in A} lambda_m tau^_m / sum_{m in A} lambda_m,
        A = {m : sign(tau^_m) = g, g != 0};  theta_0 where A is empty

    "Largest" is over the whole vector (option per="model", as in the paper) or each tensor
    (per="tensor"); entries equal to the last one kept are kept too, and rows the member or the
    base lacks do not count. Source: Yadav et al., arXiv 2306.01708, lambda equal there.
    """
    assert x.base is not None
    tau = torch.where(x.owns & x.base_owns, x.theta - x.base, 0.0)
    tau = torch.where(tau.abs() >= x.stats[:, None, None].to(tau.device), tau, 0.0)
    sign = (x.weights * tau).sum(0).sign()
    agrees = (tau.sign() == sign) & (sign != 0)
    share = torch.where(agrees, x.weights, 0.0)
    total = share.sum(0)
    share = torch.where(total > 0, share / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    return from_base(x, x.options["scale"] * share)


def trim_thresholds(tensors: Mapping[str, Blocks], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """(M,) per tensor: the magnitude of the last entry of each member that `ties` keeps."""
    density = options["density"]
    if options["per"] == "tensor":
        return {name: _thresholds([blocks], density) for name, blocks in tensors.items()}
    common = _thresholds(list(tensors.values()), density)
    return dict.fromkeys(tensors, common)


DIGIT = 16


def _thresholds(group: list[Blocks], density: float) -> Tensor:
    """The k-th largest |tau| of every member over the tensors of `group`, k = density of them.

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


def _magnitude_bits(group: list[Blocks]) -> Iterable[tuple[int, Tensor]]:
    """(member, bits of |tau| as int64) of every block, rows that member and base both have."""
    for blocks in group:
        for x in blocks:
            assert x.base is not None
            for member in range(x.members):
                have = (x.owns[member] & x.base_owns)[:, 0]
                tau = (x.theta[member] - x.base)[have].abs().flatten()
                yield member, tau.cpu().view(torch.int64)
