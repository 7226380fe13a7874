"""Log-sum-exp, mean and covariance of the item vectors under every row's softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.ops.backend import use_triton
from fisherkern.ops.library import register_op
from fisherkern.ops.products import add_product_
from fisherkern.ops.softmax_lse import RANGE, exp_minus_, logit_tiles, num_ranges, reference_logits

# Items whose D(D+1)/2 products are held at once: 17 MB in fp32 at D = 64.
_PRODUCT_ELEMENTS = 2**22


class OnlineMean:
    """lse and w̄ of a stream of tiles: sums relative to the largest logit so far.

    When a larger one comes the sums are rescaled, so that the logits are needed once
    (Milakov and Gimelshein, arXiv 1805.02867).
    """

    def __init__(self, h: Tensor, weight: Tensor) -> None:
        n, dtype = h.shape[0], torch.promote_types(h.dtype, torch.float32)
        self._highest = torch.full((n,), -torch.inf, dtype=dtype, device=h.device)
        # fp64, because ten million fp32 terms would not add up to one.
        self._total = torch.zeros(n, dtype=torch.float64, device=h.device)
        self._sums = torch.zeros(n, weight.shape[1], dtype=dtype, device=h.device)

    def add(self, z: Tensor, items: Tensor, top: Tensor) -> Tensor:
        """Add logits z (N, C), overwritten, of vectors items (C, D); top (N,): z's row maxima.

        Returns the log-sum-exp of every RANGE items, (N, ⌈C / RANGE⌉) fp64.
        """
        new = torch.maximum(self._highest, top)
        # A row that is all −inf so far has no finite maximum to subtract.
        shift = new.masked_fill(new == -torch.inf, 0.0)
        fade = (self._highest - shift).exp_()
        e = exp_minus_(z, shift[:, None])
        whole = e.shape[1] // RANGE * RANGE
        parts: Tensor = e[:, :whole].unflatten(1, (-1, RANGE)).sum(dim=2)
        if whole < e.shape[1]:
            parts = torch.cat((parts, e[:, whole:].sum(dim=1, keepdim=True)), dim=1)
        parts = parts.double()
        self._total = self._total * fade + parts.sum(dim=1)
        add_product_(self._sums.mul_(fade[:, None]), e, items.to(e.dtype))
        self._highest = new
        return parts.log_().add_(shift[:, None])

    def finish(self) -> tuple[Tensor, Tensor]:
        """(lse (N,), w̄ (N, D))."""
        lse = (self._highest + self._total.log()).to(self._sums.dtype)
        return lse, self._sums / self._total.to(self._sums.dtype)[:, None]


def _products(w: Tensor) -> Tensor:
    """w_i w_j for i <= j, rows of the upper triangle side by side: (V, D) -> (V, D(D+1)/2)."""
    width = w.shape[1]
    products = w.new_empty(w.shape[0], width * (width + 1) // 2)
    start = 0
    # Slices rather than a gather of index pairs: five times as fast on a CPU.
    for i in range(width):
        stop = start + width - i
        torch.mul(w[:, i:], w[:, i : i + 1], out=products[:, start:stop])
        start = stop
    return products


def _mean_outputs(h: Tensor, weight: Tensor, **_: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = h.shape[0], torch.promote_types(h.dtype, torch.float32)
    ranges = h.new_empty((n, num_ranges(len(weight))), dtype=torch.float64)
    return h.new_empty(n, dtype=dtype), h.new_empty((n, weight.shape[1]), dtype=dtype), ranges


@register_op(_mean_outputs)
def softmax_mean(
    h: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the log-sum-exp and the mean item vector of every row's softmax.

        w̄_n = Σ_v p_n(v) w_v,   p_n = softmax(h_n Wᵀ + b)

    One streamed pass over the items: two matrix products of N·V·D; on a GPU three, as the kernel
    of lse comes before that of w̄.

    Args:
        h: (N, D) hidden states.
        weight: (V, D) item vectors.
        bias: (V,), or None for none.

    Returns:
        lse (N,) and w̄ (N, D), fp32 or wider, and ranges (N, ⌈V / 256⌉) fp64, the log-sum-exp of
        the items 256 r … 256 r + 255, from which `sample_items` and `sample_distinct` draw.

    Source: Milakov and Gimelshein, arXiv 1805.02867 (the running maximum).
    """
    if use_triton("softmax_mean", h, weight, bias):
        from fisherkern.ops import softmax_moments_triton

        return softmax_moments_triton.softmax_mean(h, weight, bias)
    state = OnlineMean(h, weight)
    ranges = h.new_empty((h.shape[0], num_ranges(len(weight))), dtype=torch.float64)
    for start, stop, z in logit_tiles(h, weight, bias):
        found = state.add(z, weight[start:stop], z.amax(dim=1))
        ranges[:, start // RANGE : start // RANGE + found.shape[1]] = found
    return *state.finish(), ranges


@register_op(lambda lse, mean, **_: lse.new_empty(*mean.shape, mean.shape[1]))
def softmax_covariance(
    h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor, mean: Tensor
) -> Tensor:
    """Compute the covariance of the item vectors under every row's softmax.

        C_n = Σ_v p_n(v) w_v w_vᵀ − w̄_n w̄_nᵀ

    N·V·D(D+1)/2 multiply-adds, streamed over the items: in PyTorch one matrix product over the
    packed upper triangle. Holds one tile of logits and one of products.

    Args:
        h: (N, D) hidden states.
        weight: (V, D) item vectors.
        bias: (V,), or None for none.
        lse: (N,) from `softmax_mean`.
        mean: (N, D) from `softmax_mean`.

    Returns:
        (N, D, D), fp32 or wider.

    Source: Ryu et al., arXiv 2307.05476, eq. 5.
    """
    if use_triton("softmax_covariance", h, weight, bias, lse, mean):
        from fisherkern.ops import softmax_moments_triton

        return softmax_moments_triton.softmax_covariance(h, weight, bias, lse, mean)
    # Centring by the rows' common mean first: the subtraction of w̄w̄ᵀ at the end
    # then cancels little, which is what fp32 needs.
    centre = mean.mean(dim=0)
    found = second_moment(h, weight, bias, lse, centre)
    offset = mean - centre
    return found.sub_(offset[:, :, None] * offset[:, None])


def second_moment(
    h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor, centre: Tensor
) -> Tensor:
    """Σ_v p_n(v) (w_v − c)(w_v − c)ᵀ about c (D,), of items that may be some of all: (N, D, D)."""
    width = weight.shape[1]
    upper = torch.triu_indices(width, width, device=h.device)
    packed = torch.zeros(h.shape[0], upper.shape[1], dtype=lse.dtype, device=h.device)
    step = max(1, _PRODUCT_ELEMENTS // upper.shape[1])
    for start, _, z in logit_tiles(h, weight, bias):
        p = exp_minus_(z, lse[:, None])
        for first in range(0, p.shape[1], step):
            part = p[:, first : first + step]
            rows = slice(start + first, start + first + part.shape[1])
            add_product_(packed, part, _products(weight[rows].to(lse.dtype) - centre))
    moment = torch.empty(h.shape[0], width, width, dtype=lse.dtype, device=h.device)
    moment[:, upper[0], upper[1]] = packed
    moment[:, upper[1], upper[0]] = packed
    return moment


def softmax_moments_reference(
    h: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the fp64 twin: (mean (N, D), covariance (N, D, D)); holds N·V·D numbers."""
    p = reference_logits(h, weight, bias).softmax(dim=1)
    mean = p @ weight.double()
    centred = weight.double()[None] - mean[:, None]
    return mean, torch.einsum("nv,nvd,nve->nde", p, centred, centred)


def range_lse_reference(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the fp64 twin of the ranges' log-sum-exp, (N, ⌈V / RANGE⌉)."""
    z = reference_logits(h, weight, bias)
    return torch.stack([part.logsumexp(dim=1) for part in z.split(RANGE, dim=1)], dim=1)
