"""The backward pass of layer normalisation to its input, for many output gradients at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.ops import _extension
from fisherkern.ops.active_rows import active_rows
from fisherkern.ops.library import register_op


@register_op(lambda delta, **_: delta.new_empty(delta.shape), vmap_arg="delta")
def layer_norm_backward(
    delta: Tensor, normalised: Tensor, weight: Tensor | None, rstd: Tensor
) -> Tensor:
    """Compute the input gradients of layer normalisation for many output gradients at once.

        ∂x = rstd (g − mean(g) − n mean(g n)),   g = w δ,   y = w n + b,   n = (x − mean(x)) rstd

    Means are over D. In the extension on a CPU it holds nothing beside the result, otherwise some
    tensors of its size. torch.vmap over delta is more probes of one call.

    Args:
        delta: (R, P, D), the output gradients of R probes.
        normalised: (P, D), n.
        weight: (D,), w; None for ones.
        rstd: (P,), 1 / sqrt(var(x) + ε). All tensors have one dtype.

    Returns:
        (R, P, D).
    """
    if (rows := active_rows(delta)) is not None:
        result = torch.zeros_like(delta)
        result[:, rows] = _of_rows(delta[:, rows], normalised[rows], weight, rstd[rows])
        return result
    return _of_rows(delta, normalised, weight, rstd)


def _of_rows(delta: Tensor, normalised: Tensor, weight: Tensor | None, rstd: Tensor) -> Tensor:
    normalised = normalised.contiguous()
    extension = _extension.extension_for("layer_norm_backward", normalised, delta, weight, rstd)
    if extension is not None and not delta.is_cuda and delta.dtype == torch.float32:
        return _extension.layer_norm_backward(extension, delta, normalised, weight, rstd)
    g = delta if weight is None else delta * weight
    mean = g.mean(dim=2, keepdim=True)
    slope = (g * normalised).mean(dim=2, keepdim=True)
    return ((g - mean - normalised * slope) * rstd[:, None]).contiguous()


def layer_norm_backward_reference(
    delta: Tensor, normalised: Tensor, weight: Tensor | None, rstd: Tensor
) -> Tensor:
    """Compute the fp64 twin: every row's Jacobian of y, rstd w (I − 1/D − n nᵀ/D), whole."""
    delta, n, rstd = delta.double(), normalised.double(), rstd.double()
    width = n.shape[1]
    jacobian = torch.eye(width).to(n) - (1 + n[:, :, None] * n[:, None, :]) / width
    if weight is not None:
        jacobian = weight.double()[:, None] * jacobian
    return torch.einsum("rpi,pij,p->rpj", delta, jacobian, rstd)
