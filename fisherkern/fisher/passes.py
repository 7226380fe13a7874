"""A captured forward pass of some sequences, and the probes' backward passes through it.

Probes go back in blocks: what the forward pass saved is read once for a block, and the block is
large enough to fill a device even where few sequences are worked on at once.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.fisher.capture import Capture, Parameters, Site
from fisherkern.fisher.plan import Plan, make_plan, usable_sites
from fisherkern.fisher.rules import RULES
from fisherkern.fisher.subject import Autocast, batch_slice, model_input

log = logging.getLogger("fisherkern")


@dataclasses.dataclass(frozen=True)
class Pass:
    """The sequences `which` (n,), on the model's device, of a chunk, and their result (n, ...)."""

    which: Tensor
    result: Tensor
    sites: Sequence[Site]
    plan: Plan

    @property
    def needed(self) -> list[int]:
        """The sites, by index, whose gradients the plan's groups need."""
        return sorted({site for group in self.plan.groups for site in group.sites})

    @property
    def elements(self) -> int:
        """Of one probe's gradients at those sites."""
        return sum(self.sites[i].shape.numel() for i in self.needed)


class Passes:
    """Makes the passes of one model, and sends probes back through them."""

    def __init__(self, parameters: Parameters, autocast: Autocast) -> None:
        self._parameters = parameters
        self._autocast = autocast
        # The sites that rules serve, by the structure of what was captured.
        self._usable: dict[tuple[Any, ...], list[int]] = {}
        self.in_blocks = True

    def forward(self, function: Callable[[Any], Tensor], batch: Any, which: Tensor) -> Pass:
        result, sites = self._captured(function, batch, len(which))
        if result.grad_fn is None:
            return Pass(which, result, sites, Plan([], set()))
        # The structure is the model's, so it is examined once, and again where it is another:
        # on two sequences where those show the same calls, as they do in most models.
        structure = tuple(site.structure for site in sites)
        if structure not in self._usable:
            few, few_sites = result, sites
            if len(which) > 2:
                few, few_sites = self._captured(function, batch_slice(batch, 0, 2), 2)
            if tuple(site.structure for site in few_sites) != structure:
                few, few_sites = result, sites
            self._usable[structure] = usable_sites(few, few_sites)
        plan = make_plan(result, sites, self._parameters, self._usable[structure])
        return Pass(which, result, sites, plan)

    def _captured(
        self, function: Callable[[Any], Tensor], batch: Any, n: int
    ) -> tuple[Tensor, list[Site]]:
        capture = Capture(self._parameters, n, RULES)
        with torch.enable_grad(), self._autocast.on(), capture:
            result = function(model_input(batch))
        if len(result) != n:
            raise InputError(f"model: {n} sequences gave a result of {len(result)} rows")
        return result, capture.sites()

    def backward(
        self,
        forward: Pass,
        probes: int,
        block: int,
        columns: Callable[[Tensor, slice], Tensor],
    ) -> Iterator[tuple[slice, list[Tensor | None]]]:
        """Blocks of probes, each with the gradients at the sites that the plan's groups need.

        columns(which, probes): the gradient of `result`, (R, n, ...). The gradients have the
        R probes of the block first. Afterwards the pass is used up.
        """
        indices = forward.needed
        outputs = [forward.sites[i].output for i in indices]
        first = 0
        while indices and first < probes:
            which = slice(first, min(first + (block if self.in_blocks else 1), probes))
            given = columns(forward.which, which).to(forward.result.dtype)
            try:
                found = self._gradients(forward.result, outputs, given, which.stop < probes)
            except torch.OutOfMemoryError:
                if len(given) == 1:
                    raise
                block = -(-len(given) // 2)
                log.debug("out of memory with %d probes; blocks of %d", len(given), block)
                torch.cuda.empty_cache()
                continue
            if found is None:
                continue
            deltas: list[Tensor | None] = [None] * len(forward.sites)
            for index, delta in zip(indices, found, strict=True):
                deltas[index] = delta
            yield which, deltas
            first = which.stop

    def _gradients(
        self, result: Tensor, outputs: Sequence[Any], given: Tensor, retain: bool
    ) -> Sequence[Tensor | None] | None:
        """None where the model's backward pass takes one probe at a time only."""
        if len(given) == 1:
            found = torch.autograd.grad(
                result, outputs, given[0], retain_graph=retain, allow_unused=True
            )
            return [None if delta is None else delta[None] for delta in found]
        absent: set[int] = set()

        def gradients(probe: Tensor) -> list[Tensor]:
            # The graph may be needed again, by one probe at a time.
            found = torch.autograd.grad(
                result, outputs, probe, retain_graph=True, allow_unused=True
            )
            absent.update(i for i, delta in enumerate(found) if delta is None)
            return [delta for delta in found if delta is not None]

        try:
            with warnings.catch_warnings():
                # Of an operator that would be called for one probe after another.
                warnings.filterwarnings("error", message=".*batching rule")
                present = iter(torch.vmap(gradients)(given))
            return [None if i in absent else next(present) for i in range(len(outputs))]
        except torch.OutOfMemoryError:
            raise
        except Exception as reason:  # whatever a model's own backward pass may raise
            log.debug("probes one at a time: %s", reason)
            self.in_blocks = False
            return None
