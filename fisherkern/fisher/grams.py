"""Gram matrices of the inputs of linear layers, padding left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fisherkern import processes
from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.adapters.agreement import EXAMPLE, check_function
from fisherkern.adapters.batches import batch_size, batch_slice, takes
from fisherkern.adapters.parameters import Parameters
from fisherkern.adapters.sharded.models import check_whole
from fisherkern.checks import check_loader, takes_numpy
from fisherkern.errors import InputError
from fisherkern.fingerprint import fingerprint
from fisherkern.fisher.forward.capture import Capture
from fisherkern.fisher.forward.plain_run import plainly
from fisherkern.fisher.layers import HANDLERS, LinearGrad
from fisherkern.fisher.plan import make_plan, per_sequence_ops
from fisherkern.fisher.result import NamedTensors
from fisherkern.fisher.schedule import Schedule
from fisherkern.fisher.settings import check_chunk
from fisherkern.modes import eval_mode
from fisherkern.progress import progress_bar


class LinearGrams(NamedTensors):
    """(I, I) float64 Gram matrices by name of the linear weight, and `meta` about them."""

    KIND = "linear_grams"
    OTHER = "not a file of Gram matrices; `LinearGrams.save` writes one"


@takes_numpy
def linear_grams(
    model: Any, loader: Iterable[Any], *, chunk: int | None = None, progress: bool = True
) -> LinearGrams:
    """Compute the Gram matrix of the inputs of every linear weight, for RegMean.

        G = (1/P) Σ_x x xᵀ   over the inputs x (I,) of a weight (O, I)

    The P positions counted are those that the next-item logits depend on. Padding that the
    model masks gets a gradient of exactly zero and is left out, whatever the convention for
    padding; so are positions that a last layer computes for nothing. One backward pass per
    chunk, of a random combination of the logits, tells them apart. Several processes share the
    batches, as for `diag_fisher`.

    Args:
        model: As for `diag_fisher`.
        loader: As for `diag_fisher`.
        chunk: Sequences worked on at once (default: the loader's batch). Their activations are
            held, beside the matrices.
        progress: Whether to show a progress bar.

    Returns:
        (I, I) float64 by name of the weight; `meta` holds num_sequences, positions (P by name)
        and the model's fingerprint. A weight used several times gathers the inputs of all its
        uses. No entry has a weight that is frozen, that is used in any other way too (a tied
        embedding), or that no `F.linear` or `x @ W.T` takes whole.

    Raises:
        InputError: An empty loader or a chunk below 1.

    Source: Jin et al., RegMean, arXiv 2212.09849, where padding is counted.
    """
    with processes.together() as same:
        check_chunk(chunk)
        check_loader(loader)
        adapter, schedule = ModelAdapter.of(model), Schedule.of_one_probe(chunk)
        check_whole(adapter.module, "linear_grams")
        before = fingerprint(adapter.module)
        same |= {"chunk": chunk, "model": before}
    collector, dealer = _Collector(adapter), processes.Dealer()
    count, show = 0, progress and processes.rank() == 0
    with eval_mode(adapter.module, gradients=True), torch.enable_grad(), plainly():
        for module in adapter.module.modules():
            # Such attention multiplies weights by other things than inputs, but not in training.
            if getattr(module, "absorbs_projections", False):
                module.training = True
        with processes.together() as same:
            for batch in progress_bar(loader, desc="Gram matrices", unit="batch", show=show):
                n = batch_size(batch)
                if takes(dealer, batch):
                    batch = adapter.prepared(batch)
                    for part, index in schedule.length_buckets(adapter, batch, n):
                        collector.add(part, count + int(index[0]))
                count += n
            if count == 0:
                raise InputError("loader: it gave no sequences")
            same["loader"] = count
        collector.join()
    meta = {"num_sequences": count, "positions": collector.positions, "fingerprint": before}
    return LinearGrams(collector.means(), meta)


class _Collector:
    def __init__(self, model: ModelAdapter) -> None:
        self._model = model
        self._parameters = Parameters(model.module)
        self._sums: dict[str, Tensor] = {}
        self._refused: set[str] = set()
        self.positions: dict[str, int] = {}
        self._checked = False

    def add(self, batch: Any, seed: int) -> None:
        if not self._checked:
            check_function(self._model, batch_slice(batch, 0, min(EXAMPLE, batch_size(batch))))
            self._checked = True
        with Capture(self._parameters, batch_size(batch), HANDLERS, batch) as capture:
            logits = self._model.logits(batch)
        ops = capture.ops
        if logits.grad_fn is None:
            return
        plan = make_plan(logits, ops, self._parameters, per_sequence_ops(logits, ops))
        self._refused |= plan.fallback
        linear = {}
        for grad in plan.grads:
            name = grad.param.name
            whole = grad.param.shape == tuple(self._parameters.named[name].shape)
            if whole and all(isinstance(use, LinearGrad) for use in grad.uses):
                linear[name] = grad
            else:
                self._refused.add(name)
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(logits.shape, generator=generator).to(logits)
        indices = sorted({i for grad in linear.values() for i in grad.ops})
        outputs = [ops[i].output for i in indices]
        gradients = torch.autograd.grad(logits, outputs, direction) if outputs else ()
        deltas = dict(zip(indices, gradients, strict=True))
        for name, grad in linear.items():
            for index, use in zip(grad.ops, grad.uses, strict=True):
                assert isinstance(use, LinearGrad)
                delta = use.positions(ops[index].sequences_first(deltas[index][None]))
                self._add(name, use.inputs.flatten(0, 1), delta[0])

    def _add(self, name: str, inputs: Tensor, delta: Tensor) -> None:
        """Add xᵀx of `inputs` (P, I) at positions where delta (N, T, O) is not 0."""
        matters = (delta.reshape(len(inputs), -1) != 0).any(1)
        x = inputs[matters].double()
        gram = x.T @ x
        self._sums[name] = self._sums[name] + gram if name in self._sums else gram
        self.positions[name] = self.positions.get(name, 0) + len(x)

    def join(self) -> None:
        """Add up what several processes have, in their order; all have the sums afterwards."""
        every = processes.gathered((self.positions, self._refused))
        self._refused = set().union(*(refused for _, refused in every))
        positions: Counter[str] = Counter()
        for own, _ in every:
            positions.update(own)
        sums = {}
        for name in positions:
            width = self._parameters.named[name].shape[1]
            none = torch.zeros(width, width, dtype=torch.float64, device=self._model.device)
            sums[name] = processes.joined_sum(self._sums.get(name, none))
        self._sums, self.positions = sums, dict(positions)

    def means(self) -> dict[str, Tensor]:
        for name in self._refused & self._sums.keys():
            del self._sums[name], self.positions[name]
        return {name: total / max(1, self.positions[name]) for name, total in self._sums.items()}
