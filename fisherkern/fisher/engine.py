"""capture → factor → probe → accumulate, for one chunk of sequences at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkern import ops
from fisherkern.errors import InputError
from fisherkern.fisher.capture import Parameters, Place
from fisherkern.fisher.chunks import pieces
from fisherkern.fisher.factor import Factor
from fisherkern.fisher.logit_samplers import LogitRows, factorise_logits
from fisherkern.fisher.passes import Pass, Passes
from fisherkern.fisher.samplers import Rows, Settings, factorise
from fisherkern.fisher.schedule import Schedule
from fisherkern.fisher.subject import (
    Autocast,
    Head,
    Subject,
    batch_slice,
    check_probabilities,
    model_input,
)
from fisherkern.fisher.tied import TiedLookup, tied_lookups

log = logging.getLogger("fisherkern")


class Engine:
    """Sums Σ_n F_n over the chunks it is given; `fisher` holds flat sums by parameter name."""

    def __init__(self, subject: Subject, settings: Settings) -> None:
        self.subject = subject
        self.settings = settings
        self.parameters = Parameters(subject.module)
        self.fisher = {
            name: torch.zeros(
                p.numel(), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device
            )
            for name, p in self.parameters.named.items()
        }
        self.reached: set[str] = set()
        self.device = next(subject.module.parameters()).device
        self.schedule = Schedule.of(self.device)
        self.autocast = Autocast.of(self.device)
        # Sums over the sequences, on the device: a number read back is waited for.
        self.mass = torch.zeros((), dtype=torch.float64, device=self.device)
        self.kept = torch.zeros_like(self.mass)
        self.probes = 0
        self._passes = Passes(self.parameters, self.autocast)
        self._factored = subject.encode is not None
        self._warned: set[str] = set()

    def add(self, batch: Any, number: Tensor) -> None:
        """Add the sequences of `batch`; `number` (N,) int64 is their place in the loader."""
        with self.autocast.off():
            if not (self._factored and self._add_factored(batch, number)):
                self._add_logits(batch, number)

    def _add_factored(self, batch: Any, number: Tensor) -> bool:
        """The fast path; False, and no sum touched, where the head does not allow it."""
        assert self.subject.encode is not None and self.subject.head is not None
        head = self.subject.head()
        places = self._head_places(head)
        passes = self._forward(self.subject.encode, batch, len(number), head[0].shape[1])
        reason = self._why_not_factored(head, passes)
        if reason is not None:
            self._factored, self._passes = False, Passes(self.parameters, self.autocast)
            log.warning("%s; taking the slower path through the logits", reason)
            return False
        hidden = _in_order(passes)
        h = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        weight, bias = head[0].detach(), None if head[1] is None else head[1].detach()
        rows = Rows.of(h, weight, bias, number, self._target(batch), self.settings)
        check_probabilities(rows.lse, number)
        factor = factorise(rows, self.settings)
        self._add_head(rows, factor, places)
        self._probe(
            self.subject.encode,
            batch,
            passes,
            factor,
            lambda forward: tied_lookups(forward, places[0], rows, factor),
        )
        self.reached |= {place.name for place in places if place is not None}
        self._note(factor)
        return True

    def _add_logits(self, batch: Any, number: Tensor) -> None:
        passes = self._forward(self.subject.logits, batch, len(number), None)
        logits = _in_order(passes)
        if logits.dim() != 2:
            raise InputError(f"model: its logits must be (N, V), got {tuple(logits.shape)}")
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows = LogitRows(torch.log_softmax(z, dim=1), number, self._target(batch))
        check_probabilities(rows.log_p.amax(dim=1), number)
        factor = factorise_logits(rows, self.settings)
        self._probe(self.subject.logits, batch, passes, factor, lambda forward: {})
        self._note(factor)

    def _forward(
        self, function: Callable[[Any], Tensor], batch: Any, n: int, most: int | None
    ) -> list[Pass]:
        """The passes of a chunk, in which blocks of at most `most` probes fill the device."""
        probes = self.settings.most_probes(most) if self._passes.in_blocks else 1

        def size(positions: int | None) -> int:
            return n if positions is None else self.schedule.sequences(positions, probes)

        found = pieces(self.subject, batch, n, size)
        return [
            self._passes.forward(function, part, which.to(self.device)) for part, which in found
        ]

    def _head_places(self, head: Head) -> tuple[Place | None, Place | None]:
        return self.parameters.place(head[0]), self.parameters.place(head[1])

    def _why_not_factored(self, head: Head, passes: Sequence[Pass]) -> str | None:
        for tensor, place in zip(head, self._head_places(head), strict=True):
            if tensor is not None and place is None and tensor.requires_grad:
                return "the output weight is computed from parameters, not one of them"
        weight, bias = self._head_places(head)
        for plan in (forward.plan for forward in passes):
            if bias is not None and bias.name in plan.reached:
                return f"the output bias '{bias.name}' is used inside the encoder as well"
            if weight is None:
                continue
            for group in plan.groups_of(weight.name):
                if not group.lookups_only or group.place.shape[1] != weight.shape[1]:
                    return f"the output weight '{weight.name}' is used by more than a lookup"
            if weight.name in plan.fallback:
                return f"the output weight '{weight.name}' has a use no rule describes"
        return None

    def _add_head(
        self, rows: Rows, factor: Factor, places: tuple[Place | None, Place | None]
    ) -> None:
        weight, bias = (None if p is None else p.of(self.fisher[p.name]) for p in places)
        if weight is not None or bias is not None:
            ops.head_sqgrad_(
                weight, bias, rows.h, rows.weight, rows.bias, rows.lse, factor.ids, factor.omega
            )

    def _probe(
        self,
        function: Callable[[Any], Tensor],
        batch: Any,
        passes: list[Pass],
        factor: Factor,
        tied: Callable[[Pass], Mapping[int, TiedLookup]],
    ) -> None:
        """Every probe's backward pass, each group's squares added to its sum."""
        while passes:
            forward = passes.pop()  # its graph goes with it
            self.reached |= forward.plan.reached
            lookups = tied(forward)
            block = self.schedule.probes(forward.elements, forward.result.numel())
            blocks = self._passes.backward(forward, factor.probes, block, factor.columns)
            for which, deltas in blocks:
                for number, group in enumerate(forward.plan.groups):
                    fisher = group.place.of(self.fisher[group.place.name])
                    if number in lookups:
                        lookups[number].add_square_(fisher, which, deltas)
                    else:
                        group.add_square_(fisher, deltas)
            self._fall_back(function, batch, forward, factor)

    def _fall_back(
        self, function: Callable[[Any], Tensor], batch: Any, forward: Pass, factor: Factor
    ) -> None:
        """Per-sequence autograd for the parameters that no rule serves."""
        names = sorted(forward.plan.fallback)
        if not names:
            return
        if new := set(names) - self._warned:
            self._warned |= new
            names_text = ", ".join(sorted(new))
            log.warning("no rule for %s: one backward pass per sequence and probe", names_text)
        tensors = [self.parameters.named[name] for name in names]
        for i in forward.which.tolist():
            with torch.enable_grad(), self.autocast.on():
                result = function(model_input(batch_slice(batch, i, i + 1)))
            number = torch.tensor([i], device=result.device)
            for r in range(factor.probes):
                gradients = torch.autograd.grad(
                    result,
                    tensors,
                    factor.columns(number, slice(r, r + 1))[0].to(result.dtype),
                    retain_graph=r + 1 < factor.probes,
                    allow_unused=True,
                )
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is not None:
                        fisher = self.fisher[name]
                        fisher += gradient.to(fisher.dtype).square().flatten()

    def _target(self, batch: Any) -> Tensor | None:
        return self.subject.targets(batch) if self.settings.sampler == "target" else None

    def _note(self, factor: Factor) -> None:
        self.probes = max(self.probes, factor.probes)
        if factor.mass is not None:
            self.mass += factor.mass.double().sum()
        if factor.kept is not None:
            self.kept += factor.kept.double().sum()

    def finish(self, num_sequences: int) -> dict[str, Tensor]:
        """The mean over the sequences, in each parameter's shape; every parameter accounted for."""
        missing = sorted(set(self.fisher) - self.reached)
        if missing:
            raise InputError(
                f"model: {', '.join(missing)} received no gradient from the next-item logits;"
                " freeze with requires_grad_(False) what the prediction does not use"
            )
        named = self.parameters.named
        totals = torch.stack([self.fisher[name].double().sum().to(self.device) for name in named])
        for name, total in zip(named, totals.tolist(), strict=True):
            if not math.isfinite(total):
                raise InputError(f"model: the Fisher of '{name}' is not finite")
        # Rounding, and in "sketch" the noise of the cross term, can fall below zero.
        return {
            name: (self.fisher[name] / num_sequences).view(parameter.shape).clamp_(min=0)
            for name, parameter in named.items()
        }


def _in_order(passes: Sequence[Pass]) -> Tensor:
    """The results of all sequences, (N, ...), without their graphs."""
    results = torch.cat([forward.result.detach() for forward in passes])
    which = torch.cat([forward.which for forward in passes])
    return torch.empty_like(results).index_copy_(0, which, results)
