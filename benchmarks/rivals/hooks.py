"""Libraries that put hooks on modules: Opacus, BackPACK, ASDL.

All three take the port in training mode, where it calls every layer as a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fisherkern as fk
from benchmarks.rivals.port import Estimate, Port, Run, top

# Sequences at once. BackPACK holds a one-hot table of rows × sequences × positions.
CHUNK, BACKPACK_CHUNK = 32, 8


def opacus(model: fk.BERT4Rec) -> Run:
    """Per-sample gradients of every rank, squared; its hooks take one backward per forward."""
    from opacus import GradSampleModule

    port = Port(model).train()
    wrapped = GradSampleModule(port, loss_reduction="sum")

    def run(history: Tensor, k: int) -> Estimate:
        total = {name: torch.zeros_like(p) for name, p in port.named_parameters()}
        for tokens in port.tokens(history).split(CHUNK):
            p, items = top(port, tokens, k)
            for j in range(k):
                log_p = torch.log_softmax(wrapped(tokens), dim=1)
                log_p.gather(1, items[:, j : j + 1]).sum().backward()
                for name, parameter in port.named_parameters():
                    sample = parameter.grad_sample
                    total[name] += torch.einsum("n,n...->...", p[:, j], sample.square())
                wrapped.zero_grad(set_to_none=True)
        return port.estimate({name: value / len(history) for name, value in total.items()})

    return run


def backpack(model: fk.BERT4Rec) -> Run:
    """SumGradSquared of Σ_i sqrt(p) log p, rank after rank; parameters it skips are left out."""
    from backpack import backpack as active
    from backpack import extend
    from backpack.extensions import SumGradSquared

    port = Port(model).train()
    for module in port.modules():
        # It stores a module's result as `module.output`, a name that attention has for a child.
        if next(module.children(), None) is None:
            extend(module)

    def run(history: Tensor, k: int) -> Estimate:
        total: Estimate = {}
        for tokens in port.tokens(history).split(BACKPACK_CHUNK):
            p, items = top(port, tokens, k)
            for j in range(k):
                with active(SumGradSquared()):
                    log_p = torch.log_softmax(port(tokens), dim=1).gather(1, items[:, j : j + 1])
                    (p[:, j : j + 1].sqrt() * log_p).sum().backward()
                for name, parameter in port.named_parameters():
                    parameter.grad = None
                    found = parameter.__dict__.pop("sum_grad_squared", None)
                    if found is not None:
                        total[name] = total[name] + found if name in total else found
        return port.estimate({name: value / len(history) for name, value in total.items()})

    return run


def asdl(model: fk.BERT4Rec) -> Run:
    """Its exact diagonal Fisher with the loop over classes cut to the k most likely.

    A tied table is two modules to it, whose diagonals are added here.
    """
    import asdl
    from asdl.fisher import FisherExactCrossEntropy

    port = Port(model).train()
    config = asdl.FisherConfig(
        fisher_type=asdl.FISHER_EXACT,
        fisher_shapes=[asdl.SHAPE_DIAG],
        loss_type=asdl.LOSS_CROSS_ENTROPY,
    )

    class TopK(FisherExactCrossEntropy):
        k = 1

        def _fisher_loop(self, closure: Callable[..., Any]) -> None:
            log_p = torch.log_softmax(self._logits, dim=1)
            p, items = log_p.detach().exp().topk(self.k, dim=1)
            for j in range(self.k):
                closure(
                    lambda j=j: (p[:, j].sqrt() * log_p.gather(1, items[:, j : j + 1])[:, 0]).sum(),
                    retain_graph=j + 1 < self.k,
                )

    def run(history: Tensor, k: int) -> Estimate:
        maker = TopK(port, config)
        maker.k = k
        for number, tokens in enumerate(port.tokens(history).split(CHUNK)):
            maker.setup_logits_repr(maker.setup_model_call(port, tokens))
            maker.forward_and_backward(data_size=len(history), accumulate=number > 0)
        return port.estimate(_diagonals(port))

    return run


def _diagonals(port: Port) -> Estimate:
    names = {id(parameter): name for name, parameter in port.named_parameters()}
    found: Estimate = {}
    for module in port.modules():
        diagonal = getattr(getattr(module, "fisher", None), "diag", None)
        for kind, parameter in module.named_parameters(recurse=False) if diagonal else ():
            name, value = names[id(parameter)], getattr(diagonal, kind)
            found[name] = found[name] + value if name in found else value.clone()
    return found
