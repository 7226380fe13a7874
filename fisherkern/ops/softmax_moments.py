"""Mean and covariance of the item vectors under every row's softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.ops._dispatch import use_triton
from fisherkern.ops._library import register
from fisherkern.ops.softmax_lse import logit_tiles, reference_logits

# Items whose D(D+1)/2 products are held at once: 17 MB in fp32 at D = 64.
_PRODUCT_ELEMENTS = 2**22


def _softmax_mean(h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor) -> Tensor:
    if use_triton(h, weight, bias, lse):
        from fisherkern.ops import softmax_moments_triton

        return softmax_moments_triton.softmax_mean(h, weight, bias, lse)
    mean = torch.zeros(h.shape[0], weight.shape[1], dtype=lse.dtype, device=h.device)
    for start, stop, z in logit_tiles(h, weight, bias):
        p = (z - lse[:, None]).exp_()
        mean += p @ weight[start:stop].to(lse.dtype)
    return mean


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


def _softmax_covariance(
    h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor, mean: Tensor
) -> Tensor:
    if use_triton(h, weight, bias, lse, mean):
        from fisherkern.ops import softmax_moments_triton

        return softmax_moments_triton.softmax_covariance(h, weight, bias, lse, mean)
    width = weight.shape[1]
    upper = torch.triu_indices(width, width, device=h.device)
    packed = torch.zeros(h.shape[0], upper.shape[1], dtype=lse.dtype, device=h.device)
    # Centring by the rows' common mean first: the subtraction of w̄w̄ᵀ at the end
    # then cancels little, which is what fp32 needs.
    centre = mean.mean(dim=0)
    step = max(1, _PRODUCT_ELEMENTS // upper.shape[1])
    for start, _, z in logit_tiles(h, weight, bias):
        p = (z - lse[:, None]).exp_()
        for first in range(0, p.shape[1], step):
            part = p[:, first : first + step]
            rows = slice(start + first, start + first + part.shape[1])
            packed.addmm_(part, _products(weight[rows].to(lse.dtype) - centre))
    offset = mean - centre
    packed -= offset[:, upper[0]] * offset[:, upper[1]]
    covariance = torch.empty(h.shape[0], width, width, dtype=lse.dtype, device=h.device)
    covariance[:, upper[0], upper[1]] = packed
    covariance[:, upper[1], upper[0]] = packed
    return covariance


def _fake_mean(h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor) -> Tensor:
    return lse.new_empty((h.shape[0], weight.shape[1]))


def _fake_covariance(
    h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor, mean: Tensor
) -> Tensor:
    return lse.new_empty((h.shape[0], weight.shape[1], weight.shape[1]))


_mean_op = register(
    "softmax_mean(Tensor h, Tensor weight, Tensor? bias, Tensor lse) -> Tensor",
    _softmax_mean,
    _fake_mean,
)
_covariance_op = register(
    "softmax_covariance(Tensor h, Tensor weight, Tensor? bias, Tensor lse, Tensor mean) -> Tensor",
    _softmax_covariance,
    _fake_covariance,
)


def softmax_mean(h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor) -> Tensor:
    """w̄ = Σ_v p(v) w_v for every row: (N, D), (V, D), (V,) or None, (N,) -> (N, D)."""
    return _mean_op(h, weight, bias, lse)


def softmax_covariance(
    h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor, mean: Tensor
) -> Tensor:
    """C = Σ_v p(v) w_v w_vᵀ − w̄ w̄ᵀ for every row, (N, D, D), fp32 or wider.

    h (N, D), weight (V, D), bias (V,) or None, lse (N,) and mean (N, D) from
    `softmax_lse` and `softmax_mean`. Costs N·V·D(D+1)/2 multiply-adds, streamed over
    the items: in PyTorch one matrix product over the packed upper triangle, which
    holds one tile of logits and one of products. Design section 1; the paper's eq. 5.
    """
    return _covariance_op(h, weight, bias, lse, mean)


def softmax_moments_reference(
    h: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The fp64 twin: (mean (N, D), covariance (N, D, D)); holds N·V·D numbers."""
    p = reference_logits(h, weight, bias).softmax(dim=1)
    mean = p @ weight.double()
    centred = weight.double()[None] - mean[:, None]
    return mean, torch.einsum("nv,nvd,nve->nde", p, centred, centred)
