"""capture → factor → probe → accumulate, for one chunk of sequences at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkern import ops
from fisherkern.errors import InputError
from fisherkern.fisher.capture import Capture, Parameters, Place, Site
from fisherkern.fisher.logit_samplers import LogitRows, factorise_logits
from fisherkern.fisher.plan import Group, Plan, make_plan, usable_sites
from fisherkern.fisher.rules import RULES
from fisherkern.fisher.samplers import Factor, Rows, Settings, factorise
from fisherkern.fisher.subject import Head, Subject, batch_slice, check_probabilities, model_input

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
        self.mass = 0.0
        self.kept = 0.0
        self.probes = 0
        self._usable: tuple[list[Any], list[int]] | None = None
        self._factored = subject.encode is not None
        self._warned: set[str] = set()

    def add(self, batch: Any, number: Tensor) -> None:
        """Add the sequences of `batch`; `number` (N,) int64 is their place in the loader."""
        if self._factored and self._add_factored(batch, number):
            return
        self._add_logits(batch, number)

    def _add_factored(self, batch: Any, number: Tensor) -> bool:
        """The fast path; False, and no sum touched, where the head does not allow it."""
        assert self.subject.encode is not None and self.subject.head is not None
        hidden, sites, plan = self._forward(self.subject.encode, batch, len(number))
        weight, bias = self.subject.head()
        places = self._head_places((weight, bias))
        reason = self._why_not_factored((weight, bias), plan)
        if reason is not None:
            self._factored, self._usable = False, None
            log.warning("%s; taking the slower path through the logits", reason)
            return False
        h = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32))
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        rows = Rows.of(h, weight, bias, number, self._target(batch), self.settings)
        check_probabilities(rows.lse, number)
        factor = factorise(rows, self.settings)
        self._add_head(rows, factor, places)
        tied = [g for g in plan.groups if places[0] is not None and g.place.name == places[0].name]
        shared = [self._tied(group, places[0], rows, factor) for group in tied]
        self._probe(hidden, sites, plan, factor, shared)
        self._fall_back(self.subject.encode, batch, factor, plan)
        self.reached |= plan.reached | {place.name for place in places if place is not None}
        self._note(factor)
        return True

    def _add_logits(self, batch: Any, number: Tensor) -> None:
        logits, sites, plan = self._forward(self.subject.logits, batch, len(number))
        if logits.dim() != 2:
            raise InputError(f"model: its logits must be (N, V), got {tuple(logits.shape)}")
        z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        rows = LogitRows(torch.log_softmax(z, dim=1), number, self._target(batch))
        check_probabilities(rows.log_p.amax(dim=1), number)
        factor = factorise_logits(rows, self.settings)
        self._probe(logits, sites, plan, factor, [])
        self._fall_back(self.subject.logits, batch, factor, plan)
        self.reached |= plan.reached
        self._note(factor)

    def _forward(
        self, function: Callable[[Any], Tensor], batch: Any, n: int
    ) -> tuple[Tensor, Sequence[Site], Plan]:
        result, sites = self._captured(function, batch, n)
        if result.grad_fn is None:
            return result, sites, Plan([], set())
        # The structure is the model's, so it is examined once, and again when it changes:
        # on two sequences where those show the same calls, as they do in most models.
        structure = [site.structure for site in sites]
        if self._usable is None or self._usable[0] != structure:
            few, few_sites = result, sites
            if n > 2:
                few, few_sites = self._captured(function, batch_slice(batch, 0, 2), 2)
            if [site.structure for site in few_sites] != structure:
                few, few_sites = result, sites
            self._usable = (structure, usable_sites(few, few_sites))
        plan = make_plan(result, sites, self.parameters, self._usable[1])
        return result, sites, plan

    def _captured(
        self, function: Callable[[Any], Tensor], batch: Any, n: int
    ) -> tuple[Tensor, list[Site]]:
        with torch.enable_grad(), Capture(self.parameters, n, RULES) as capture:
            result = function(model_input(batch))
        if len(result) != n:
            raise InputError(f"model: {n} sequences gave a result of {len(result)} rows")
        return result, capture.sites()

    def _head_places(self, head: Head) -> tuple[Place | None, Place | None]:
        return self.parameters.place(head[0]), self.parameters.place(head[1])

    def _why_not_factored(self, head: Head, plan: Plan) -> str | None:
        for tensor, place in zip(head, self._head_places(head), strict=True):
            if tensor is not None and place is None and tensor.requires_grad:
                return "the output weight is computed from parameters, not one of them"
        weight, bias = self._head_places(head)
        if bias is not None and bias.name in plan.reached:
            return f"the output bias '{bias.name}' is used inside the encoder as well"
        if weight is None:
            return None
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
        result: Tensor,
        sites: Sequence[Site],
        plan: Plan,
        factor: Factor,
        tied: Sequence[tuple[Group, Callable[[int, Sequence[Tensor | None]], None]]],
    ) -> None:
        """Every probe's backward pass, each group's squares added to its sum."""
        if not plan.groups:
            return
        indices = sorted({site for group in plan.groups for site in group.sites})
        outputs = [sites[i].output for i in indices]
        shared = {id(group) for group, _ in tied}
        own = [group for group in plan.groups if id(group) not in shared]
        for r in range(factor.probes):
            found = torch.autograd.grad(
                result,
                outputs,
                factor.column(r).to(result.dtype),
                retain_graph=r + 1 < factor.probes,
                allow_unused=True,
            )
            deltas: list[Tensor | None] = [None] * len(sites)
            for index, delta in zip(indices, found, strict=True):
                deltas[index] = delta
            for group in own:
                group.add_square_(group.place.of(self.fisher[group.place.name]), deltas)
            for _, add in tied:
                add(r, deltas)

    def _tied(
        self, group: Group, head: Place | None, rows: Rows, factor: Factor
    ) -> tuple[Group, Callable[[int, Sequence[Tensor | None]], None]]:
        """A lookup of the output weight's own parameter: its square and the cross term.

        F_v = Σ_n [ (output part)² + Σ_r (S_v^r)² + 2 h ∘ Σ_r β_vr S_v^r ]; the first
        is in closed form with the head, S_v^r is the lookup's gradient of probe r.
        """
        assert head is not None
        lookup = group.joined_lookup()
        width = head.shape[1]
        item = lookup.row - (head.start - group.place.start) // width
        known = (lookup.row >= 0) & (item >= 0) & (item < head.shape[0])
        beta = rows.h.new_zeros(len(item), factor.probes)
        beta[known] = factor.cross(lookup.sequence[known], item[known]).to(beta.dtype)
        hidden = 2 * rows.h[lookup.sequence]
        fisher = group.place.of(self.fisher[group.place.name])

        def add(r: int, deltas: Sequence[Tensor | None]) -> None:
            sums = lookup.sums(group.joined_delta(deltas).to(hidden.dtype))
            lookup.add_rows_(fisher, sums * (sums + beta[:, r : r + 1] * hidden))

        return group, add

    def _fall_back(
        self, function: Callable[[Any], Tensor], batch: Any, factor: Factor, plan: Plan
    ) -> None:
        """Per-sequence autograd for the parameters that no rule serves."""
        names = sorted(plan.fallback)
        if not names:
            return
        if new := set(names) - self._warned:
            self._warned |= new
            names_text = ", ".join(sorted(new))
            log.warning("no rule for %s: one backward pass per sequence and probe", names_text)
        tensors = [self.parameters.named[name] for name in names]
        columns = [factor.column(r) for r in range(factor.probes)]
        for i in range(len(columns[0])):
            with torch.enable_grad():
                result = function(model_input(batch_slice(batch, i, i + 1)))
            for r, column in enumerate(columns):
                gradients = torch.autograd.grad(
                    result,
                    tensors,
                    column[i : i + 1].to(result.dtype),
                    retain_graph=r + 1 < len(columns),
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
            self.mass += float(factor.mass.sum())
        if factor.kept is not None:
            self.kept += float(factor.kept.sum())

    def finish(self, num_sequences: int) -> dict[str, Tensor]:
        """The mean over the sequences, in each parameter's shape; every parameter accounted for."""
        missing = sorted(set(self.fisher) - self.reached)
        if missing:
            raise InputError(
                f"model: {', '.join(missing)} received no gradient from the next-item logits;"
                " freeze with requires_grad_(False) what the prediction does not use"
            )
        result = {}
        for name, parameter in self.parameters.named.items():
            mean = (self.fisher[name] / num_sequences).view(parameter.shape)
            if not math.isfinite(float(mean.sum())):
                raise InputError(f"model: the Fisher of '{name}' is not finite")
            # Rounding, and in "sketch" the noise of the cross term, can fall below zero.
            result[name] = mean.clamp_(min=0)
        return result
