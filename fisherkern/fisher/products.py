"""Products of the whole Fisher matrix with vectors, without the matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherkern import processes
from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.adapters.agreement import check_function
from fisherkern.adapters.batches import batch_size, batch_slice, takes
from fisherkern.adapters.sharded.models import check_whole
from fisherkern.checks import check_loader
from fisherkern.errors import InputError, one_line
from fisherkern.fingerprint import fingerprint
from fisherkern.fisher.forward.plain_run import NormGuard, plainly
from fisherkern.fisher.schedule import Schedule
from fisherkern.fisher.settings import check_chunk
from fisherkern.modes import eval_mode

# Sequences of which a product is compared with those of each alone, and what they may differ by.
_COMPARED = 8
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2}


class FisherProduct:
    """The Fisher matrix as a function v -> F v, made by `fisher_product`.

        F = (1/N) Σ_n Σ_y p_n(y) g_ny g_nyᵀ,   g_ny = ∂ log p_n(y) / ∂θ

    Called with a mapping from every trainable parameter's name to a tensor of its shape, it
    gives one of the same names and shapes in the parameters' dtype (fp32 or wider). `meta`
    holds fingerprint and num_sequences.
    """

    def __init__(self, model: ModelAdapter, batches: list[Any], count: int) -> None:
        """`batches`: this process's, of `count` sequences of all processes."""
        self._model = model
        self._batches = batches
        self._count = count
        self._parameters = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
        self._checked = False
        self.meta = {
            "fingerprint": fingerprint(model.module),
            "num_sequences": self._count,
        }

    def __call__(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(vector, Mapping):
            raise InputError(f"vector: a {type(vector).__name__} is no mapping of tensors by name")
        direction = []
        for name, parameter in self._parameters.items():
            if name not in vector or vector[name].shape != parameter.shape:
                raise InputError(f"vector: it has no tensor '{name}' of the parameter's shape")
            direction.append(vector[name].to(parameter))
        total = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in self._parameters.items()
        }
        # Fused attention cannot be derived twice.
        unfused = sdpa_kernel(SDPBackend.MATH)
        mode = eval_mode(self._model.module, gradients=True)
        with mode, torch.enable_grad(), plainly(), unfused, processes.together():
            if self._batches and not self._checked:
                self._check(direction)
                self._checked = True
            for batch in self._batches:
                for name, part in zip(total, self._of_batch(batch, direction), strict=True):
                    total[name] += part
        return {name: processes.joined_sum(value) / self._count for name, value in total.items()}

    def _check(self, direction: list[Tensor]) -> None:
        """Compare the product of a few sequences together with that of each alone."""
        batch = self._batches[0]
        n = min(batch_size(batch), _COMPARED)
        part = batch_slice(batch, 0, n)
        check_function(self._model, part)
        if n == 1:
            return
        together = self._of_batch(part, direction)
        each = [self._of_batch(batch_slice(part, i, i + 1), direction) for i in range(n)]
        alone = [torch.stack(parts).sum(0) for parts in zip(*each, strict=True)]
        largest = max(float(value.abs().max()) for value in alone if value.numel())
        for name, one, other in zip(self._parameters, together, alone, strict=True):
            gap = float((one - other).abs().max()) if one.numel() else 0.0
            if not gap <= _TOLERANCE.get(one.dtype, 0.25) * largest:
                raise InputError(
                    f"model: products of '{name}' are {gap / max(largest, 1e-300):.2g} of their "
                    "largest off those of each sequence alone; does a gradient depend on the other "
                    "sequences (scale_grad_by_freq)?"
                )

    def _of_batch(self, batch: Any, direction: list[Tensor]) -> tuple[Tensor, ...]:
        """sum_n J_n^T C_n J_n v of the logits, C_n = diag(p_n) - p_n p_n^T."""
        parameters = list(self._parameters.values())
        with NormGuard():
            logits = self._model.logits(batch)
        # J^T u is linear in u, so its derivative along v, in u, is J v: two backward passes
        # instead of a forward-mode derivative, which not every operation has.
        u = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(
            logits, parameters, u, create_graph=True, materialize_grads=True
        )
        products = [(g * v).sum() for g, v in zip(pulled, direction, strict=True)]
        inner = torch.stack(products).sum()
        try:
            (pushed,) = torch.autograd.grad(inner, u, retain_graph=True, materialize_grads=True)
        except NotImplementedError as error:
            raise InputError(
                f"model: it cannot be derived twice: {one_line(str(error), 200)}"
            ) from None
        wide = torch.promote_types(logits.dtype, torch.float32)
        p = logits.detach().to(wide).softmax(1)
        pushed = pushed.to(wide)
        weighted = p * (pushed - (p * pushed).sum(1, keepdim=True))
        return torch.autograd.grad(
            logits, parameters, weighted.to(logits.dtype), materialize_grads=True
        )


def fisher_product(model: Any, loader: Iterable[Any], *, chunk: int | None = None) -> FisherProduct:
    """Make the Fisher matrix of all trainable parameters together a function v -> F v.

        F v = (1/N) Σ_n J_nᵀ (diag(p_n) − p_n p_nᵀ) J_n v,   J_n = ∂z_n / ∂θ

    over the loader's N sequences, with all items and every use of a tied parameter. F is
    symmetric and positive semi-definite; its diagonal is that of `diag_fisher(...,
    sampler="exact")`. A product costs about three backward passes over the data. Several processes
    share the batches, as for `diag_fisher`, and call the function together.

    Args:
        model: As for `diag_fisher`. It must be differentiable twice (fused attention is
            computed unfused) and may not be changed while the product is used.
        loader: As for `diag_fisher`. Batches are read once and kept, so that every product sees
            the same ones.
        chunk: Sequences worked on at once (default: the loader's batch). Their logits
            (chunk, V) and two graphs of their forward pass are held.

    Returns:
        A function from {name: tensor of the parameter's shape} to the same, fp32 or wider.

    Raises:
        InputError: An empty loader, a chunk below 1 or a model with nothing to train.

    Source: Martens, New insights on the natural gradient, arXiv 1412.1193, section 8 (products).
    """
    with processes.together() as same:
        check_chunk(chunk)
        check_loader(loader)
        adapter, schedule = ModelAdapter.of(model), Schedule.of_one_probe(chunk)
        check_whole(adapter.module, "fisher_product")
        if not any(p.requires_grad for p in adapter.module.parameters()):
            raise InputError("model: it has no trainable parameter")
        own, count, dealer = [], 0, processes.Dealer()
        for batch in loader:
            n = batch_size(batch)
            if takes(dealer, batch):
                batch = adapter.prepared(batch)
                own += [part for part, _ in schedule.length_buckets(adapter, batch, n)]
            count += n
        if count == 0:
            raise InputError("loader: it gave no sequences")
        product = FisherProduct(adapter, own, count)
        same |= {"chunk": chunk, "model": product.meta["fingerprint"], "loader": count}
    return product
