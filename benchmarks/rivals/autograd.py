"""What PyTorch alone offers."""

from __future__ import annotations

import torch
from torch import Tensor

import fisherkern as fk
from benchmarks.rivals.port import Estimate, Port, Run, top

CHUNK = 32


def naive(model: fk.BERT4Rec) -> Run:
    """One backward pass for every (sequence, item): the definition, with no library."""

    def run(history: Tensor, k: int) -> Estimate:
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        parameters = list(model.parameters())
        for row in history.split(1):
            log_p = torch.log_softmax(model(row), dim=1)[0]
            found = log_p.detach().exp().topk(k)
            for p, item in zip(found.values, found.indices, strict=True):
                gradients = torch.autograd.grad(log_p[item], parameters, retain_graph=True)
                for name, gradient in zip(total, gradients, strict=True):
                    total[name] += p * gradient.square()
        return {name: value / len(history) for name, value in total.items()}

    return run


def vmap_grad(model: fk.BERT4Rec) -> Run:
    """torch.func: vmap over sequences of the gradient, one rank after the other."""
    port = Port(model).eval()
    parameters = {name: p.detach() for name, p in port.named_parameters()}

    def log_probability(parameters: Estimate, row: Tensor, item: Tensor) -> Tensor:
        logits = torch.func.functional_call(port, parameters, (row[None],))
        return torch.log_softmax(logits, dim=1)[0].gather(0, item[None])[0]

    gradient = torch.func.vmap(
        torch.func.grad(log_probability), in_dims=(None, 0, 0), chunk_size=CHUNK
    )

    def run(history: Tensor, k: int) -> Estimate:
        tokens = port.tokens(history)
        p, items = top(port, tokens, k)
        total = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        for j in range(k):
            for name, g in gradient(parameters, tokens, items[:, j]).items():
                total[name] += torch.einsum("n,n...->...", p[:, j], g.square())
        return port.estimate({name: value / len(history) for name, value in total.items()})

    return run
