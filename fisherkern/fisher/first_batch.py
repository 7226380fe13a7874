"""The engine's numbers against plain autograd, on the first sequences that it is given."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fisherkern.adapters.agreement import (
    batch_norm_refused,
    check_no_probabilities,
    distance,
)
from fisherkern.adapters.batches import batch_size, batch_slice
from fisherkern.adapters.parameters import Parameters
from fisherkern.errors import InputError
from fisherkern.fisher.engine import Engine
from fisherkern.fisher.factors.factor import CovarianceFactor
from fisherkern.fisher.factors.logit_samplers import LogitStats, factor_logit_items
from fisherkern.fisher.factors.samplers import SoftmaxStats, factor_items
from fisherkern.fisher.forward.vjp import linear_vector_jacobians
from fisherkern.fisher.output_layers import OutputLayer
from fisherkern.fisher.positions import POSITION_IDS, counted_positions

log = logging.getLogger("fisherkern")

# Sequences that go through the engine together, of which the first and the last are compared.
_TOGETHER = 32
# From the most likely item to the one that is compared.
_STEP = 7919
# Entries of a parameter that is compared: what is held of each is eight times as large.
_MOST_ENTRIES = 2**26
# By dtype: what gradients may differ by, of their tensor's largest, and of the model's largest.
_TOLERANCE = {torch.float64: (1e-5, 1e-11), torch.float32: (1e-2, 1e-5)}
_COARSE = (0.25, 0.05)


@dataclasses.dataclass(frozen=True)
class _PlainGradients:
    """∂ log p(y) / ∂θ of item y, by parameter where any comes, and the logits (V,)."""

    item: int
    logits: Tensor
    gradients: dict[str, Tensor]


class FirstBatchCheck:
    """Compares (∂ log p(y) / ∂θ)² of an item y, as the engine has it, with plain autograd's.

    Of two sequences, parameter by parameter. The engine works on them among others, through its
    capture, handlers, closed forms and fallback; autograd on each alone, through the logits as the
    model gives them, with nothing recorded. A table of so many items that its gradients would take
    more than all else is taken to be frozen meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._most = 0  # sequences of the batches checked
        every = engine.parameters.named
        few = Parameters(engine.model.module, _MOST_ENTRIES)
        self._parameters = engine.parameters if len(few.named) == len(every) else few
        self._named = self._parameters.named
        # Of a table that is shared out few rows are compared at once.
        if engine.shared_out:
            return
        if engine.settings.check and len(self._named) < len(every):
            log.warning(
                "%s: too large to compare its gradients with those of plain autograd, as those of "
                "the other parameters are",
                ", ".join(sorted(every.keys() - self._named.keys())),
            )

    def __call__(self, batch: Any) -> None:
        """Check a batch that the engine was given: the first, and the first of several sequences.

        Raises:
            InputError: The gradients differ by more than rounding.
        """
        settings = self.engine.settings
        if self._most > 1 or not settings.check or settings.reduction == "batchwise":
            return
        if not self._named:
            return
        batch = self.engine.model.prepared(batch)
        n = min(batch_size(batch), _TOGETHER)
        if n <= self._most:
            return
        self._most = n
        part = batch_slice(batch, 0, n)
        engine = self.engine.of_few(part)
        if engine is not self.engine:
            self._parameters, self._named = engine.parameters, engine.parameters.named
        alone = {i: self._plain(engine, batch_slice(part, i, i + 1), 0) for i in sorted({0, n - 1})}
        items = {i: plain.item for i, plain in alone.items()}
        single = _OneItem(engine, self._parameters, items)
        single.add(part, torch.arange(n, device=single.device))
        fault = self._difference(single.fisher, alone.values())
        if fault is None:
            return
        # Next to a kink of the model, rounding decides: then all is equal within the batch.
        beside = {i: self._plain(engine, part, i, plain.item) for i, plain in alone.items()}
        if self._difference(single.fisher, beside.values()) is None and all(
            distance(alone[i].logits, beside[i].logits) is None for i in alone
        ):
            return
        raise InputError(
            f"model: gradients of {fault} off those of plain autograd, so its Fisher would be"
            " wrong; is every pass the same function of each sequence alone? check=False computes"
            " it all the same"
        )

    def _plain(
        self, engine: Engine, batch: Any, row: int, item: int | None = None
    ) -> _PlainGradients:
        """∂ log p(y) / ∂θ of a row by autograd, of a less likely item if none is given."""
        model, named = engine.model, self._named
        with torch.enable_grad(), engine.autocast.on(), batch_norm_refused():
            z = model.all_logits(batch) if engine.every else model.logits(batch)
        if engine.every:
            counted = counted_positions(model, batch, (z.shape[0], z.shape[1]))[row]
            if not bool(counted.any()):
                return _PlainGradients(0, z[row, -1].detach(), {})
            z = z[:, int(counted.nonzero().max())]
        z = z[row]
        check_no_probabilities(z.detach())
        if item is None:
            # Of the most likely one 1 − p may be a rounding of autograd's.
            item = (int(z.argmax()) + 1 + _STEP % max(len(z) - 1, 1)) % len(z)
        log_p = torch.log_softmax(z.to(torch.promote_types(z.dtype, torch.float32)), dim=0)[item]
        gradients = linear_vector_jacobians(log_p, list(named.values()), torch.ones_like(log_p))
        pairs = zip(named, gradients, strict=True)
        present = {name: g for name, g in pairs if g is not None}
        return _PlainGradients(item, z.detach(), present)

    def _difference(self, ours: dict[str, Tensor], plain: Iterable[_PlainGradients]) -> str | None:
        """Return the parameter that is further from its gradients than rounding, and how far."""
        named = self._named
        expected = {name: torch.zeros_like(total) for name, total in ours.items()}
        for found in plain:
            for name, gradient in found.gradients.items():
                expected[name] += gradient.to(expected[name].dtype).square().flatten()
        kinds = [_TOLERANCE.get(p.dtype, _COARSE) for p in named.values()]
        if self.engine.autocast.enabled:
            kinds.append(_COARSE)
        relative, floor = (max(column) for column in zip(*kinds, strict=True))
        gaps = [
            torch.stack([(ours[name].clamp(min=0).sqrt() - root).abs().max(), root.max()])
            for name, root in ((name, value.sqrt()) for name, value in expected.items())
        ]
        pairs = torch.stack([pair.double().cpu() for pair in gaps]).tolist()
        noise = floor * max(largest for _, largest in pairs)
        for name, (gap, largest) in zip(expected, pairs, strict=True):
            if gap > relative * largest + noise:
                return f"'{name}' are {gap / max(largest, noise):.2g} of their largest"
        return None


class _OneItem(Engine):
    """The engine with an item of weight 1 for each sequence in `compared`, 0 for the others."""

    def __init__(self, engine: Engine, parameters: Parameters, compared: dict[int, int]) -> None:
        settings = dataclasses.replace(
            engine.settings, sampler="random", k=1, probes=None, tol=None,
            positions="all" if engine.every else "last",
        )  # fmt: skip
        super().__init__(engine.model, settings, parameters)
        self.compared = compared
        self.by_logits, self.num_items = engine.by_logits, engine.num_items
        alike = len(self.parameters.named) == len(engine.parameters.named)
        self.runner = engine.runner if alike else self._runner(engine.runner.function)
        self.fallback = set(engine.fallback)  # of which was warned

    def _output_layer(self) -> OutputLayer:
        layer = super()._output_layer()
        if layer.weight_param is not None:
            return layer
        # A table that is left out; any other has sent the engine through the logits before.
        return dataclasses.replace(layer, weight=layer.weight.detach())

    def _factor(self, stats: SoftmaxStats | LogitStats) -> CovarianceFactor:
        ids = stats.sequence_ids
        if self.every:
            ids = ids // POSITION_IDS
        items, omega = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.float64)
        for sequence, item in self.compared.items():
            # Of all positions the last of a sequence.
            place = (ids == sequence).nonzero()[-1:, 0]
            items[place], omega[place] = item, 1.0
        items, omega = items[:, None], omega[:, None]
        if isinstance(stats, LogitStats):
            return factor_logit_items(stats, items, omega)
        return factor_items(stats, items, omega)
