"""Contrastive losses between two views of every sequence in a batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.checks import check_choice, check_positive, check_unit
from fisherkern.errors import InputError, shown


class ContrastiveLoss(Protocol):
    """A loss of two views, rows in the same order; a frozen dataclass, for its settings."""

    def __call__(self, first: Tensor, second: Tensor, same: Tensor | None = None) -> Tensor:
        """Return the loss, 0-dim, of `first` and `second` (N, D).

        Rows that `same` (N, N) bool, symmetric, pairs are no negatives of each other.
        """
        ...


@dataclasses.dataclass(frozen=True)
class NTXent:
    """InfoNCE over 2N views (SimCLR's NT-Xent), their mean.

        -(1/2N) Σ_i log( exp(s_i,i+ / τ) / Σ_{j != i} exp(s_ij / τ) )

    i+ is the other view of i's sequence. The defaults, τ = 1 and the bare dot product, are those of
    the released code of CL4SRec and DuoRec. Views that `same` ties are left out of each other's
    denominators. Holds 2N x 2N similarities.

    Args:
        temperature: τ, positive and finite.
        similarity: "dot", s_ij is the dot product of views i and j, or "cosine".

    Raises:
        InputError: a temperature that is not positive and finite, or an unknown similarity.

    Source:
        CL4SRec eq. 4; DuoRec eq. 10.
    """

    temperature: float = 1.0
    similarity: str = "dot"

    def __post_init__(self) -> None:
        _check("NTXent", self.temperature, self.similarity)

    def __call__(self, first: Tensor, second: Tensor, same: Tensor | None = None) -> Tensor:
        """Return the loss, 0-dim; see `ContrastiveLoss`."""
        count = first.shape[0]
        views = _scaled(torch.cat([first, second]), self.similarity)
        scores = _products(views, views) / self.temperature
        index = torch.arange(2 * count, device=scores.device)
        partner = (index + count) % (2 * count)
        left_out = torch.zeros_like(scores, dtype=torch.bool)
        if same is not None:
            left_out = same.repeat(2, 2)
            left_out[index, partner] = False
        left_out[index, index] = True
        return F.cross_entropy(scores.masked_fill(left_out, -math.inf), partner)


@dataclasses.dataclass(frozen=True)
class SymmetricNoiseTolerant:
    """SGCL's loss against noisy views, mean over N.

        (1/N) Σ_i [ -exp(q s_ii) / q + (λ (exp(s_ii) + Σ_j exp(s_ij)))^q / q ]

    s_ij = cos(first_i, second_j) / τ. It is the RINCE loss (Chuang et al., CVPR 2022), which counts
    the positive once and not twice in the second term; as q -> 0 both tend to InfoNCE, and q = 1 is
    symmetric in the sense of noisy binary labels. Unlike `NTXent`, only rows of `second` are
    negatives and only rows of `first` anchors. j leaves out what `same` ties to i, but not i. Holds
    N x N similarities.

    Args:
        q: in (0, 1].
        weight: λ, positive and finite.
        temperature: τ, positive and finite.
        similarity: "cosine", or "dot" for the bare product.

    Raises:
        InputError: a number outside its interval, or an unknown similarity.

    Source:
        Zhao et al., TOIS 2025, arXiv 2408.02691: the function and the defaults of the authors'
        released code, not of the text of the paper.
    """

    q: float = 0.01
    weight: float = 0.1
    temperature: float = 0.2
    similarity: str = "cosine"

    def __post_init__(self) -> None:
        _check("SymmetricNoiseTolerant", self.temperature, self.similarity)
        check_unit("SymmetricNoiseTolerant: q", self.q, "(0, 1]")
        check_positive("SymmetricNoiseTolerant: weight", self.weight)

    def __call__(self, first: Tensor, second: Tensor, same: Tensor | None = None) -> Tensor:
        """Return the loss, 0-dim; see `ContrastiveLoss`."""
        first, second = _scaled(first, self.similarity), _scaled(second, self.similarity)
        scores = _products(first, second) / self.temperature
        positive = scores.diagonal()
        if same is not None:
            own = torch.eye(len(same), dtype=torch.bool, device=same.device)
            scores = scores.masked_fill(same & ~own, -math.inf)
        # In logarithms: exp(s) alone would overflow at low temperatures.
        total = torch.logaddexp(positive, scores.logsumexp(dim=1)) + math.log(self.weight)
        return (((self.q * total).exp() - (self.q * positive).exp()) / self.q).mean()


def check_loss(name: str, loss: Any) -> None:
    """Raise InputError unless `loss`, an argument of objective `name`, can be called."""
    if not callable(loss):
        raise InputError(
            f"{name}: loss must be a contrastive loss such as NTXent(), got {shown(loss)}"
        )


def _scaled(views: Tensor, similarity: str) -> Tensor:
    return F.normalize(views, dim=1) if similarity == "cosine" else views


def _products(first: Tensor, second: Tensor) -> Tensor:
    # A temperature magnifies what autocast would round.
    with torch.autocast(first.device.type, enabled=False):
        dtype = torch.promote_types(first.dtype, torch.float32)
        return first.to(dtype) @ second.to(dtype).t()


def _check(name: str, temperature: float, similarity: str) -> None:
    check_positive(f"{name}: temperature", temperature)
    check_choice(f"{name}: similarity", similarity, ("dot", "cosine"))
