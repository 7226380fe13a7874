"""The backward pass of attention from its probabilities, for many output gradients at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherkern.ops import _extension
from fisherkern.ops.active_rows import active_positions
from fisherkern.ops.library import register_op

Gradients = tuple[Tensor, Tensor, Tensor]


def _outputs(delta: Tensor, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Gradients:
    dq, dk, dv = (tensor.new_empty(len(delta), *tensor.shape) for tensor in (q, k, v))
    return dq, dk, dv


@register_op(_outputs, vmap_arg="delta")
def attention_backward(
    p: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Gradients:
    """Compute the gradients of q, k and v of attention for many output gradients at once.

        dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P ∘ (dP − Σ_j P dP),  dQ = scale dS K,  dK = scale dSᵀ Q

    in every sequence and head, for o = p v with p = softmax(scale q kᵀ). Where p is 0, by a mask or
    else, nothing passes. In the extension on a CPU it holds one head at a time beside the results,
    otherwise two tensors of R times the size of p and R copies of q, k and v. torch.vmap over delta
    is more probes of one call.

    Args:
        p: (N, H, Q, T), the probabilities.
        delta: (R, N, Q, H, e), the output gradients of R probes.
        q: (N, Q, H, d).
        k: (N, T, H, d).
        v: (N, T, H, e). All tensors have one dtype.
        scale: What q kᵀ was multiplied by.

    Returns:
        dq, dk and dv, (R, ...) of the shapes of q, k and v.
    """
    if (queries := active_positions(delta)) is None:
        return _of_queries(p, delta, q, k, v, scale)
    number = torch.arange(len(q), device=q.device)[:, None]
    own = p.transpose(1, 2)[number, queries].transpose(1, 2)
    given = own, delta[:, number, queries], q[number, queries]
    active, dk, dv = _of_queries(*given, k, v, scale)
    dq = q.new_zeros(len(delta), *q.shape)
    dq[:, number, queries] = active
    return dq, dk, dv


def _of_queries(
    p: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Gradients:
    p = p.contiguous()
    extension = _extension.extension_for("attention_backward", p, delta, q, k, v)
    if extension is not None and not p.is_cuda and q.dtype == torch.float32:
        return _extension.attention_backward(extension, p, delta, q, k, v, scale)
    delta, q, k, v = (tensor.transpose(-3, -2) for tensor in (delta, q, k, v))
    dp = delta @ v.mT
    ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True)) * scale
    found = (ds @ k, ds.mT @ q, p.mT @ delta)
    dq, dk, dv = (tensor.transpose(-3, -2).contiguous() for tensor in found)
    return dq, dk, dv


def attention_backward_reference(
    p: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Gradients:
    """Compute the fp64 twin: the products written out over r, n, h, queries i and keys j."""
    p, delta, q, k, v = (tensor.double() for tensor in (p, delta, q, k, v))
    dp = torch.einsum("rnihe,njhe->rnhij", delta, v)
    # The Jacobian of a softmax, diag(p) − p pᵀ, whole.
    jacobian = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    ds = torch.einsum("nhijl,rnhil->rnhij", jacobian, dp)
    return (
        scale * torch.einsum("rnhij,njhd->rnihd", ds, k),
        scale * torch.einsum("rnhij,nihd->rnjhd", ds, q),
        torch.einsum("nhij,rnihe->rnjhe", p, delta),
    )
