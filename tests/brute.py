"""The definition of the diagonal Fisher, one backward pass per (sequence, item), in float64.

Shared by the tests as their only reference; it uses nothing of fisherkern.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def all_gradients(model: nn.Module, history: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """p (N, V) and, by parameter, ∂ log p_i(y)/∂θ for every i and y: (N, V, *shape)."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    tensors = [p for p in model.parameters() if p.requires_grad]
    probabilities, gradients = [], {name: [] for name in names}
    for i in range(len(history)):
        log_p = torch.log_softmax(model(history[i : i + 1]), dim=1)[0]
        probabilities.append(log_p.detach().exp())
        rows = [
            torch.autograd.grad(v, tensors, retain_graph=True, allow_unused=True) for v in log_p
        ]
        for name, tensor, column in zip(names, tensors, zip(*rows, strict=True), strict=True):
            filled = [torch.zeros_like(tensor) if g is None else g.to_dense() for g in column]
            gradients[name].append(torch.stack(filled))
    return torch.stack(probabilities), {name: torch.stack(g) for name, g in gradients.items()}


def near_gradients(model: nn.Module, history: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`all_gradients` where one item t has nearly all the mass: no difference cancels.

    ∂ log p(y) = (∂z_y − ∂z_t) + Σ_v p_v (∂z_t − ∂z_v), the logits' gradients one by one.
    """
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    tensors = [p for p in model.parameters() if p.requires_grad]
    probabilities, gradients = [], {name: [] for name in names}
    for i in range(len(history)):
        z = model(history[i : i + 1])[0]
        p = torch.softmax(z.detach(), dim=0)
        rows = [torch.autograd.grad(v, tensors, retain_graph=True, allow_unused=True) for v in z]
        probabilities.append(p)
        for name, tensor, column in zip(names, tensors, zip(*rows, strict=True), strict=True):
            filled = [torch.zeros_like(tensor) if g is None else g.to_dense() for g in column]
            away = torch.stack(filled) - filled[int(p.argmax())]
            gradients[name].append(away - torch.einsum("v,v...->...", p, away))
    return torch.stack(probabilities), {name: torch.stack(g) for name, g in gradients.items()}


def fisher(gradients: dict[str, Tensor], omega: Tensor) -> dict[str, Tensor]:
    """(1/N) Σ_i Σ_y ω_iy g_iy² with ω (N, V)."""
    return {
        name: torch.einsum("nv,nv...->...", omega, g.square()) / len(omega)
        for name, g in gradients.items()
    }


def counts(ids: Tensor, weights: Tensor, num_items: int) -> Tensor:
    """ω (N, V) of items drawn with weights: the sum of the weights of each item's draws."""
    omega = torch.zeros(len(ids), num_items, dtype=torch.float64)
    return omega.scatter_add_(1, ids, weights.double())
