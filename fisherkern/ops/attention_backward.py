"""The backward pass of attention from its probabilities, for many output gradients in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.ops import _extension
from fisherkern.ops._library import register

Gradients = tuple[Tensor, Tensor, Tensor]


def _attention_backward(
    p: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Gradients:
    p = p.contiguous()
    extension = _extension.serving(p, delta, q, k, v)
    if extension is not None and not p.is_cuda and q.dtype == torch.float32:
        return _extension.attention_backward(extension, p, delta, q, k, v, scale)
    delta, q, k, v = (tensor.transpose(1, 2) for tensor in (delta, q, k, v))
    dp = delta @ v.transpose(2, 3)
    ds = p * (dp - (p * dp).sum(dim=3, keepdim=True)) * scale
    found = (ds @ k, ds.transpose(2, 3) @ q, p.transpose(2, 3) @ delta)
    dq, dk, dv = (tensor.transpose(1, 2).contiguous() for tensor in found)
    return dq, dk, dv


def _fake(p: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_op = register(
    "attention_backward(Tensor p, Tensor delta, Tensor q, Tensor k, Tensor v, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    _fake,
)


def attention_backward(
    p: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Gradients:
    """The gradients of q, k and v from delta, that of o = p v with p = softmax(scale q kᵀ).

    dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP − Σ_j P dP), dQ = scale dS K, dK = scale dSᵀ Q, in every
    sequence and head. p (N, H, Q, T); delta (N, Q, H, e), q (N, Q, H, d), k (N, T, H, d),
    v (N, T, H, e), all of one type; the results are shaped as q, k and v. Where p is 0, by a mask
    or else, nothing passes. In the extension on a CPU it holds one head at a time beside the
    results, otherwise two tensors of the size of p.
    """
    return _op(p, delta, q, k, v, scale)


def attention_backward_reference(
    p: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Gradients:
    """The fp64 twin: the products written out over n, h, queries i and keys j."""
    p, delta, q, k, v = (tensor.double() for tensor in (p, delta, q, k, v))
    dp = torch.einsum("nihe,njhe->nhij", delta, v)
    # The Jacobian of a softmax, diag(p) − p pᵀ, whole.
    jacobian = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    ds = torch.einsum("nhijl,nhil->nhij", jacobian, dp)
    return (
        scale * torch.einsum("nhij,njhd->nihd", ds, k),
        scale * torch.einsum("nhij,nihd->njhd", ds, q),
        torch.einsum("nhij,nihe->njhe", p, delta),
    )
