"""Products of the whole Fisher matrix with vectors, without the matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.fingerprint import fingerprint
from fisherkern.fisher.chunks import chunks
from fisherkern.fisher.subject import Subject, batch_size, evaluation_mode, model_input


class FisherProduct:
    """v -> F v, F = (1/N) sum_n sum_y p_n(y) g_ny g_ny^T with g_ny = d log p_n(y) / d theta.

    Called with a mapping from every trainable parameter's name to a tensor of its shape, it
    gives one of the same names and shapes in the parameters' dtype (fp32 or wider). `meta`
    holds fingerprint and num_sequences.
    """

    def __init__(self, subject: Subject, batches: list[Any]) -> None:
        self._subject = subject
        self._batches = batches
        self._count = sum(batch_size(batch) for batch in batches)
        self._parameters = {n: p for n, p in subject.module.named_parameters() if p.requires_grad}
        self.meta = {
            "fingerprint": fingerprint(subject.module),
            "num_sequences": self._count,
        }

    def __call__(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        direction = []
        for name, parameter in self._parameters.items():
            if name not in vector or vector[name].shape != parameter.shape:
                raise InputError(f"vector: it has no tensor '{name}' of the parameter's shape")
            direction.append(vector[name].to(parameter))
        total = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in self._parameters.items()
        }
        with evaluation_mode(self._subject.module), torch.enable_grad():
            for batch in self._batches:
                for name, part in zip(total, self._of_batch(batch, direction), strict=True):
                    total[name] += part
        return {name: value / self._count for name, value in total.items()}

    def _of_batch(self, batch: Any, direction: list[Tensor]) -> tuple[Tensor, ...]:
        """sum_n J_n^T C_n J_n v of the logits, C_n = diag(p_n) - p_n p_n^T."""
        parameters = list(self._parameters.values())
        logits = self._subject.logits(model_input(batch))
        # J^T u is linear in u, so its derivative along v, in u, is J v: two backward passes
        # instead of a forward-mode derivative, which not every operation has.
        u = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(
            logits, parameters, u, create_graph=True, materialize_grads=True
        )
        products = [(g * v).sum() for g, v in zip(pulled, direction, strict=True)]
        inner = torch.stack(products).sum()
        (pushed,) = torch.autograd.grad(inner, u, retain_graph=True, materialize_grads=True)
        wide = torch.promote_types(logits.dtype, torch.float32)
        p = logits.detach().to(wide).softmax(1)
        pushed = pushed.to(wide)
        weighted = p * (pushed - (p * pushed).sum(1, keepdim=True))
        return torch.autograd.grad(
            logits, parameters, weighted.to(logits.dtype), materialize_grads=True
        )


def fisher_product(model: Any, loader: Iterable[Any], *, chunk: int | None = None) -> FisherProduct:
    """The Fisher matrix of all trainable parameters together, as a function v -> F v:

        F v = (1/N) sum_n J_n^T (diag(p_n) - p_n p_n^T) J_n v,   J_n = d z_n / d theta

    over the loader's N sequences, with all items, every use of a tied parameter included. It
    is symmetric and positive semi-definite; its diagonal is that of `diag_fisher(...,
    sampler="exact")`.

    model, loader: as for `diag_fisher`; the batches are read once and kept, so that every call
    sees the same ones. chunk: sequences worked on at once (default: the loader's batch): their
    logits (chunk, V) and two graphs of their forward pass are held. A product costs about
    three backward passes over the data. The model must be differentiable twice (fused
    attention kernels are not) and may not be changed while the product is used.

    Raises InputError for an empty loader, a chunk below 1 or a model with nothing to train.
    Source: Martens, New insights on the natural gradient, arXiv 1412.1193, section 8 (products).
    """
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk: must be at least 1, got {chunk}")
    subject = Subject.of(model)
    if not any(p.requires_grad for p in subject.module.parameters()):
        raise InputError("model: it has no trainable parameter")
    batches = []
    for batch in loader:
        n = batch_size(batch)
        batches += [part for part, _ in chunks(subject, batch, n, chunk or max(n, 1))]
    if not batches:
        raise InputError("loader: it gave no sequences")
    return FisherProduct(subject, batches)
