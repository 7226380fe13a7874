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

from fisherkern.adapters.batches import batch_slice
from fisherkern.adapters.parameters import Parameters
from fisherkern.errors import InputError
from fisherkern.fisher.autocast import Autocast
from fisherkern.fisher.capture import Capture, CapturedOp, structure_of
from fisherkern.fisher.factor import ProbeVectors
from fisherkern.fisher.layers import HANDLERS
from fisherkern.fisher.plan import Plan, make_plan, per_sequence_ops

log = logging.getLogger("fisherkern")


@dataclasses.dataclass(frozen=True)
class CapturedForward:
    """The forward pass of a bucket: its `result` (n, ...), the captured ops and the plan.

    `index` (n,), on the model's device, says which sequences of the micro-batch these are.
    """

    index: Tensor
    result: Tensor
    ops: Sequence[CapturedOp]
    plan: Plan

    @property
    def needed(self) -> list[int]:
        """Indices of the ops whose gradients the plan needs."""
        return sorted({op for grad in self.plan.grads for op in grad.ops})

    @property
    def elements(self) -> int:
        """Elements of one probe's gradients at those ops."""
        return sum(self.ops[i].shape.numel() for i in self.needed)


class ForwardBackward:
    """Runs one function of a model forward with capture, and probes back through it."""

    def __init__(
        self, function: Callable[[Any], Tensor], parameters: Parameters, autocast: Autocast
    ) -> None:
        self.function = function
        self._parameters = parameters
        self._autocast = autocast
        # Indices of the ops that handlers serve, by the structure of what was captured.
        self._per_sequence: dict[tuple[Any, ...], list[int]] = {}
        self.in_blocks = True

    def run(self, batch: Any) -> Tensor:
        """Run the function with a graph, nothing captured."""
        with torch.enable_grad(), self._autocast.on():
            return self.function(batch)

    def forward(self, batch: Any, index: Tensor) -> CapturedForward:
        """Run the sequences `index` (n,) of a micro-batch, which `batch` holds."""
        result, ops = self._captured(batch, len(index))
        if result.grad_fn is None:
            return CapturedForward(index, result, ops, Plan([], set()))
        # The structure is the model's, so it is examined once, and again where it is another:
        # on two sequences where those show the same calls, as they do in most models.
        structure = structure_of(ops)
        if structure not in self._per_sequence:
            examined = result, ops
            if len(index) > 2:
                small = self._captured(batch_slice(batch, 0, 2), 2)
                if structure_of(small[1]) == structure:
                    examined = small
            self._per_sequence[structure] = per_sequence_ops(*examined)
        plan = make_plan(result, ops, self._parameters, self._per_sequence[structure])
        return CapturedForward(index, result, ops, plan)

    def _captured(self, batch: Any, n: int) -> tuple[Tensor, list[CapturedOp]]:
        capture = Capture(self._parameters, n, HANDLERS)
        with torch.enable_grad(), self._autocast.on(), capture:
            result = self.function(batch)
        if len(result) != n:
            raise InputError(f"model: {n} sequences gave a result of {len(result)} rows")
        return result, capture.ops

    def backward(
        self, forward: CapturedForward, probes: int, block: int, probe_vectors: ProbeVectors
    ) -> Iterator[tuple[slice, list[Tensor | None]]]:
        """Blocks of probes, each with the output gradients of the ops that the plan needs.

        probe_vectors(index, probes): the gradient of `result`, (R, n, ...). The output gradients,
        by op, are (R, n, ...), as `ParamUse` takes them. Afterwards the pass is used up.
        """
        indices = forward.needed
        outputs = [forward.ops[i].output for i in indices]
        first = 0
        while indices and first < probes:
            span = slice(first, min(first + (block if self.in_blocks else 1), probes))
            given = probe_vectors(forward.index, span).to(forward.result.dtype)
            try:
                gradients = self._gradients(forward.result, outputs, given, span.stop < probes)
            except torch.OutOfMemoryError:
                if len(given) == 1:
                    raise
                block = -(-len(given) // 2)
                log.debug("out of memory with %d probes; blocks of %d", len(given), block)
                torch.cuda.empty_cache()
                continue
            if gradients is None:
                continue
            deltas: list[Tensor | None] = [None] * len(forward.ops)
            for index, delta in zip(indices, gradients, strict=True):
                if delta is not None:
                    deltas[index] = forward.ops[index].sequences_first(delta)
            del gradients
            yield span, deltas
            first = span.stop

    def _gradients(
        self, result: Tensor, outputs: Sequence[Any], given: Tensor, retain: bool
    ) -> Sequence[Tensor | None] | None:
        """Gradients of a block; None where the model's backward pass takes one probe at a time."""
        if len(given) == 1:
            single = torch.autograd.grad(
                result, outputs, given[0], retain_graph=retain, allow_unused=True
            )
            return [None if delta is None else delta[None] for delta in single]
        absent: set[int] = set()

        def gradients(probe: Tensor) -> list[Tensor]:
            # The graph may be needed again, by one probe at a time.
            deltas = torch.autograd.grad(
                result, outputs, probe, retain_graph=True, allow_unused=True
            )
            absent.update(i for i, delta in enumerate(deltas) if delta is None)
            return [delta for delta in deltas if delta is not None]

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
