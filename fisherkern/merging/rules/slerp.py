"""Interpolation along great circles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern.merging.rules.average import average
from fisherkern.merging.rules.base import MergeBlock, TensorBlocks, merge_method

# Sines below this are rounding: the members point the same way, or opposite ways.
PARALLEL = 1e-6
# Of three members and more: 1 + cosine of a member and their mean, and the mean's squared length,
# below which rounding says where the direction lies.
OPPOSITE = 1e-2


def gram_of_members(
    tensors: Mapping[str, TensorBlocks], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return (M, M) per tensor: <theta_m, theta_l> over the rows that all members own."""
    found = {}
    for name, blocks in tensors.items():
        total = torch.zeros(blocks.members, blocks.members, dtype=torch.float64)
        for x in blocks:
            flat = torch.where(x.owns.all(0), x.theta, 0.0).flatten(1)
            total += (flat @ flat.T).cpu()
        found[name] = total
    return found


@merge_method(
    "slerp",
    title="Spherical interpolation",
    source="https://doi.org/10.1145/325334.325242",
    takes=("weights",),
    prepare=gram_of_members,
)
def slerp(block: MergeBlock) -> Tensor:
    """Interpolate each tensor's direction on the sphere; average its length by lambda.

        theta* = (sum_m lambda_m |theta_m|) exp_mu(sum_m lambda_m log_mu(u_m)),
        u_m = theta_m/|theta_m|, mu = sum_m lambda_m u_m normalised

    For two members the second factor is sin((1-t)W)/sin(W) u_0 + sin(tW)/sin(W) u_1, t =
    lambda_1 and W the angle between them (Shoemake, SIGGRAPH 1985); for more it is one step
    towards their mean on the sphere, whatever their order. Members that point the same way or
    cancel, a member opposite the others' mean, a tensor of zeros, and item rows that some member
    lacks, which do not enter the angle either, are averaged by lambda.
    """
    plain = average(block)
    coefficients = _coefficients(block.stats, block.lam.cpu())
    if coefficients is None:
        return plain
    mixed = (coefficients[:, None, None].to(block.theta.device) * block.theta).sum(0)
    return torch.where(block.owns.all(0), mixed, plain)


def _coefficients(gram: Tensor, lam: Tensor) -> Tensor | None:
    """Return c with theta* = sum_m c_m theta_m; None where the lambda-average takes its place."""
    length = gram.diagonal().sqrt()
    if not (length > 0).all() or int((lam > 0).sum()) < 2:
        return None
    cosines = gram / length[:, None] / length
    chord = math.sqrt(max(0.0, float(lam @ cosines @ lam)))
    used = lam > 0
    pair = int(used.sum()) == 2
    if chord < PARALLEL or (not pair and chord * chord < OPPOSITE):
        return None
    # From here on vectors are coefficients of u_0, u_1, ...
    mu = lam / chord
    along = (cosines @ mu).clamp(-1, 1)
    across = ((1 - along) * (1 + along)).sqrt()
    nearest = PARALLEL if pair else OPPOSITE
    if not (across[used] > PARALLEL).any() or (along[used] < nearest - 1).any():
        return None
    # log_mu(u) = angle/sin(angle) (u - cos(angle) mu)
    ratio = torch.where(across > PARALLEL, along.acos() / across.clamp(min=PARALLEL), 1.0)
    tangent = lam * ratio - (lam * ratio * along).sum() * mu
    angle = math.sqrt(max(0.0, float(tangent @ cosines @ tangent)))
    sinc = math.sin(angle) / angle if angle > PARALLEL else 1.0
    direction = math.cos(angle) * mu + sinc * tangent
    return float(lam @ length) * direction / length
