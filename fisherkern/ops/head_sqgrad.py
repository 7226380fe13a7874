"""Squared gradients of the output layer, summed over the items and the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.ops.backend import use_triton
from fisherkern.ops.library import register_op
from fisherkern.ops.products import add_product_, add_rows_
from fisherkern.ops.softmax_lse import exp_minus_, logit_tiles, reference_logits


@register_op(mutates=("weight_fisher", "bias_fisher"))
def head_sqgrad_(
    weight_fisher: Tensor | None,
    bias_fisher: Tensor | None,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ids: Tensor | None = None,
    omega: Tensor | None = None,
) -> None:
    """Add the squared gradients of the output layer, summed over items and rows.

        weight_fisher[v] += Σ_n Σ_y ω_ny (∂ log p_n(y)/∂w_v)²,   ∂ log p(y)/∂w_v = (1[v=y] − p_v) h

    and likewise for the bias. Without ids the sum runs over all items with ω = p, and is
    p_v (1 − p_v) h². With ids it is (Σ_j ω_j) p_v² h² for every v, streamed, plus the sparse
    ω_j (1 − 2 p_v) h² where v = y_j; repeated ids count each time. Holds one tile of logits and,
    with ids, N·K·D numbers.

    Args:
        weight_fisher: (V, D), added to; None to leave it out.
        bias_fisher: (V,), added to; None to leave it out.
        h: (N, D) hidden states.
        weight: (V, D) item vectors.
        bias: (V,), or None for none.
        lse: (N,) from `softmax_mean`.
        ids: (N, K) int64 items, None for all.
        omega: (N, K) their weights ω, given with ids.

    Source: Ryu et al., arXiv 2307.05476, eqs. 5, 7 to 9.
    """
    if use_triton("head_sqgrad_", h, weight, bias, lse, weight_fisher, bias_fisher, omega):
        from fisherkern.ops import head_sqgrad_triton

        head_sqgrad_triton.head_sqgrad_(
            weight_fisher, bias_fisher, h, weight, bias, lse, ids, omega
        )
        return
    add_square_of_items_(weight_fisher, bias_fisher, h, weight, bias, lse, ids, omega)


def add_square_of_items_(
    weight_fisher: Tensor | None,
    bias_fisher: Tensor | None,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ids: Tensor | None,
    omega: Tensor | None,
) -> None:
    """`head_sqgrad_` in PyTorch, also of some of all items: ids that are not among them are −1."""
    squared = h.to(lse.dtype).square()
    share = torch.ones_like(lse) if omega is None else omega.to(lse.dtype).sum(dim=1)
    scaled = share[:, None] * squared
    for start, stop, z in logit_tiles(h, weight, bias, by_item=True):
        # (items, N): the product below then needs no transposed copy.
        if omega is not None:
            coefficient = exp_minus_(z, lse, 2.0)
        else:
            p = exp_minus_(z, lse)
            coefficient = p.addcmul_(p, p, value=-1)
        if weight_fisher is not None:
            add_product_(weight_fisher[start:stop], coefficient, scaled)
        if bias_fisher is not None:
            bias_fisher[start:stop] += coefficient @ share
    if ids is None or omega is None:
        return
    others, ids = ids < 0, ids.clamp(min=0)
    rows = weight[ids].to(lse.dtype)
    z = torch.einsum("nd,nkd->nk", h.to(lse.dtype), rows)
    if bias is not None:
        z += bias[ids].to(lse.dtype)
    coefficient = omega.to(lse.dtype) * (1 - 2 * (z - lse[:, None]).exp())
    coefficient.masked_fill_(others, 0.0)
    if weight_fisher is not None:
        terms = coefficient[:, :, None] * squared[:, None]
        add_rows_(weight_fisher, ids.flatten(), terms.flatten(0, 1).to(weight_fisher.dtype))
    if bias_fisher is not None:
        add_rows_(bias_fisher, ids.flatten(), coefficient.flatten().to(bias_fisher.dtype))


def head_sqgrad_reference(
    h: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, omega: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the fp64 twin: weight part (V, D), bias part (V,); an N×V matrix an item."""
    p = reference_logits(h, weight, bias).softmax(dim=1)
    if ids is None or omega is None:
        everything = torch.arange(weight.shape[0], device=h.device)
        ids, omega = everything.expand(h.shape[0], -1), p
    coefficient = torch.zeros_like(p)
    for j in range(ids.shape[1]):
        indicator = torch.zeros_like(p).scatter_(1, ids[:, j : j + 1], 1.0)
        coefficient += omega[:, j : j + 1].double() * (indicator - p).square()
    return coefficient.T @ h.double().square(), coefficient.sum(dim=0)
