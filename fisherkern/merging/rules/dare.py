"""DARE: task vectors of which a random part is dropped and the rest rescaled."""

from __future__ import annotations

import hashlib
from typing import Annotated

import torch
from torch import Tensor

from fisherkern.members.options import Number
from fisherkern.merging.rules.base import MergeBlock, merge_method
from fisherkern.merging.rules.task_vectors import from_base, relative_weights
from fisherkern.ops import counter_rng


@merge_method(
    "dare",
    title="DARE",
    source="https://arxiv.org/abs/2311.03099",
    needs=("base",),
    takes=("weights",),
)
def dare(
    block: MergeBlock,
    *,
    density: Annotated[float, Number(0.0, 1.0, above=True)] = 0.5,
    scale: Annotated[float, Number(0.0)] = 0.3,
) -> Tensor:
    """Return theta* = theta_0 + scale sum_m (M lambda_m) b_m tau_m / density.

    b_m ~ Bernoulli(density). An entry's draw depends on the seed, the tensor's name, the member's
    number and the entry's position, not on blocks or device.
    Source: Yu et al., arXiv 2311.03099; density is 1 minus their drop rate.
    """
    n, width = block.theta.shape[1:]
    device = block.theta.device
    rows = torch.arange(block.start, block.start + n, device=device)
    columns = torch.arange(width, device=device)
    key = block.seed ^ int.from_bytes(_digest(block.name), "little")
    kept = torch.stack(
        [
            counter_rng.uniform(key + member, rows, columns) < density
            for member in range(block.members)
        ]
    )
    return from_base(block, scale * relative_weights(block) * kept / density)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()[:7]
