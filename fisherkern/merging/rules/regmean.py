"""RegMean: linear layers merged so that their outputs on the members' inputs change least."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from fisherkern.members.options import Number
from fisherkern.merging.rules.average import average
from fisherkern.merging.rules.base import MergeBlock, TensorBlocks, merge_method
from fisherkern.merging.rules.fisher import fisher_average

# Solutions kept for the next block: one per set of owners.
KEPT = 16


class InputGrams:
    """G~_m of one layer's inputs for every member, and the solutions already worked out."""

    def __init__(self, grams: list[Tensor], alpha: float, ridge: float) -> None:
        gram = torch.stack([g.to("cpu", torch.float64) for g in grams])
        diagonal = torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
        size = diagonal.sum((1, 2)).mean() / gram.shape[1]
        identity = torch.eye(gram.shape[1], dtype=torch.float64)
        self.gram = alpha * gram + (1 - alpha) * diagonal + ridge * size * identity
        self._kept: dict[tuple[float, ...], Tensor] = {}

    def pull(self, lam: Tensor) -> Tensor:
        """(M, I, I): lambda_m G~_m (sum_l lambda_l G~_l)^+ for lambda (M,)."""
        key = tuple(lam.tolist())
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            weighted = lam.cpu()[:, None, None] * self.gram
            self._kept[key] = weighted @ _inverse(weighted.sum(0))
        return self._kept[key]


def _inverse(matrix: Tensor) -> Tensor:
    """Return the pseudo-inverse of a symmetric positive semi-definite matrix."""
    # With a unit diagonal, features of unequal size do not pass for noise.
    size = matrix.diagonal().clamp(min=torch.finfo(matrix.dtype).tiny).rsqrt()
    values, vectors = torch.linalg.eigh(size[:, None] * matrix * size)
    noise = len(matrix) * torch.finfo(matrix.dtype).eps * values[-1:].clamp(min=0)
    inverse = torch.where(values > noise, 1 / values, 0.0)
    scaled: Tensor = (vectors * inverse) @ vectors.T
    return size[:, None] * scaled * size


def input_grams(tensors: Mapping[str, TensorBlocks], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `InputGrams` of the tensors that have Gram matrices."""
    return {
        name: InputGrams(blocks.grams, options["alpha"], options["ridge"])
        for name, blocks in tensors.items()
        if blocks.grams is not None
    }


@merge_method(
    "regmean",
    title="RegMean",
    source="https://arxiv.org/abs/2212.09849",
    needs=("grams",),
    takes=("weights", "fishers"),
    prepare=input_grams,
)
def regmean(
    block: MergeBlock,
    *,
    alpha: Annotated[float, Number(0.0, 1.0)] = 0.9,
    ridge: Annotated[float, Number(0.0)] = 1e-6,
) -> Tensor:
    """Return W* that minimises sum_m lambda_m tr (W - W_m) G~_m (W - W_m)^T.

    The sum is over the owners of each row:

        W* = W_ + sum_m lambda_m (W_m - W_) G~_m (sum_m lambda_m G~_m)^+,
        W_ = sum_m lambda_m W_m,  G~_m = a G_m + (1 - a) diag G_m + ridge g I

    with G_m (I, I) the Gram matrix of the inputs of member m's layer (the mean over positions,
    as `linear_grams` gives it), a the option "alpha" and g the mean diagonal entry over the
    members. In directions that no input takes W* is the average W_, ridge or not; members that
    agree come back bit for bit. Tensors without a Gram matrix: `fisher_average`.
    Source: Jin et al., arXiv 2212.09849, eq. 3 and section 3.3.
    """
    if block.stats is None:
        return fisher_average(block)
    plain = average(block)
    merged = plain.clone()
    owners, pattern = torch.unique(block.weights[:, :, 0], dim=1, return_inverse=True)
    for number in range(owners.shape[1]):
        rows = pattern == number
        pull = block.stats.pull(owners[:, number]).to(plain.device)
        # Differences from the average, so that what agrees is not put through the inverse.
        change = block.theta[:, rows] - plain[rows]
        merged[rows] += (change @ pull).sum(0)
    return merged
