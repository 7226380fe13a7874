"""Gram matrices of the inputs of linear layers, padding left out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fisherkern.encoders.transformer import SelfAttention
from fisherkern.errors import InputError
from fisherkern.fingerprint import fingerprint
from fisherkern.fisher.capture import Capture, Parameters
from fisherkern.fisher.chunks import chunks
from fisherkern.fisher.plan import make_plan, usable_sites
from fisherkern.fisher.result import NamedTensors
from fisherkern.fisher.rules import RULES, LinearWeight
from fisherkern.fisher.subject import Subject, batch_size, evaluation_mode, model_input
from fisherkern.progress import progress_bar


class LinearGrams(NamedTensors):
    """(I, I) float64 Gram matrices by name of the linear weight, and `meta` about them."""

    KIND = "linear_grams"
    OTHER = "not a file of Gram matrices; `LinearGrams.save` writes one"


def linear_grams(
    model: Any, loader: Iterable[Any], *, chunk: int | None = None, progress: bool = True
) -> LinearGrams:
    """G = (1/P) sum_x x x^T over the inputs x (I,) of every linear weight (O, I), for RegMean.

    The P positions counted are those the next-item logits depend on: padding, which a model
    masks somewhere, gets a gradient of exactly zero there and is left out, whatever the
    convention for padding; so are positions a last layer computes for nothing. One backward
    pass per chunk, of a random combination of the logits, tells them apart.

    model, loader, chunk: as for `diag_fisher`; the model runs in eval mode and is left as it
    was. A weight used several times gathers the inputs of all its uses. Weights that are used
    in any other way too (a tied embedding), that are frozen, or that no `F.linear` or `x @
    W.T` takes whole, have no entry. `meta` holds num_sequences, positions (P by name) and the
    model's fingerprint. Allocates the matrices and one chunk's activations. Raises InputError
    for an empty loader or a chunk below 1.
    Source: Jin et al., RegMean, arXiv 2212.09849, where padding is counted.
    """
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk: must be at least 1, got {chunk}")
    subject = Subject.of(model)
    collector = _Collector(subject)
    count = 0
    with evaluation_mode(subject.module), torch.enable_grad():
        for module in subject.module.modules():
            # For one query it multiplies keys' and values' weights by other things than inputs.
            if isinstance(module, SelfAttention):
                module.training = True
        for batch in progress_bar(loader, desc="Gram matrices", unit="batch", show=progress):
            n = batch_size(batch)
            for part, which in chunks(subject, batch, n, chunk or max(n, 1)):
                collector.add(part, count + int(which[0]))
            count += n
    if count == 0:
        raise InputError("loader: it gave no sequences")
    meta = {
        "num_sequences": count,
        "positions": collector.positions,
        "fingerprint": fingerprint(subject.module),
    }
    return LinearGrams(collector.means(), meta)


class _Collector:
    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._parameters = Parameters(subject.module)
        self._sums: dict[str, Tensor] = {}
        self._refused: set[str] = set()
        self.positions: dict[str, int] = {}

    def add(self, batch: Any, seed: int) -> None:
        with Capture(self._parameters, batch_size(batch), RULES) as capture:
            logits = self._subject.logits(model_input(batch))
        sites = capture.sites()
        if logits.grad_fn is None:
            return
        plan = make_plan(logits, sites, self._parameters, usable_sites(logits, sites))
        self._refused |= plan.fallback
        linear = {}
        for group in plan.groups:
            name = group.place.name
            whole = group.place.shape == tuple(self._parameters.named[name].shape)
            if whole and all(isinstance(use, LinearWeight) for use in group.uses):
                linear[name] = group
            else:
                self._refused.add(name)
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(logits.shape, generator=generator).to(logits)
        indices = sorted({i for group in linear.values() for i in group.sites})
        outputs = [sites[i].output for i in indices]
        found = torch.autograd.grad(logits, outputs, direction) if outputs else ()
        deltas = dict(zip(indices, found, strict=True))
        for name, group in linear.items():
            for index, use in zip(group.sites, group.uses, strict=True):
                assert isinstance(use, LinearWeight)
                delta = use.positions(sites[index].sequences_first(deltas[index][None]))
                self._add(name, use.inputs.flatten(0, 1), delta[0])

    def _add(self, name: str, inputs: Tensor, delta: Tensor) -> None:
        """inputs (P, I), delta (N, T, O) of as many positions."""
        matters = (delta.reshape(len(inputs), -1) != 0).any(1)
        x = inputs[matters].double()
        gram = x.T @ x
        self._sums[name] = self._sums[name] + gram if name in self._sums else gram
        self.positions[name] = self.positions.get(name, 0) + len(x)

    def means(self) -> dict[str, Tensor]:
        for name in self._refused & self._sums.keys():
            del self._sums[name], self.positions[name]
        return {name: total / max(1, self.positions[name]) for name, total in self._sums.items()}
