"""A captured forward pass of some sequences, and the probes' backward passes through it.

Probes go back in blocks: what the forward pass saved is read once for a block, and the block is
large enough to fill a device even where few sequences are worked on at once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fisherkern.adapters.agreement import BATCH_DEPENDENT, distance
from fisherkern.adapters.batches import batch_slice
from fisherkern.adapters.parameters import Parameters
from fisherkern.errors import InputError
from fisherkern.fisher.autocast import Autocast
from fisherkern.fisher.factors.factor import CovarianceFactor, ProbeVectors
from fisherkern.fisher.forward.capture import Capture, CapturedOp, structure_of
from fisherkern.fisher.forward.plain_run import NormGuard
from fisherkern.fisher.forward.shared_tensors import EntriesCache
from fisherkern.fisher.forward.vjp import (
    batched_vector_jacobians,
    linear_vector_jacobians,
    single_vector_jacobians,
)
from fisherkern.fisher.layers import HANDLERS
from fisherkern.fisher.plan import Plan, make_plan, per_sequence_ops
from fisherkern.fisher.schedule import stored_sequences
from fisherkern.fisher.sliced_backward import SlicedBackward, sliced, takes_slices

log = logging.getLogger("fisherkern")


@dataclasses.dataclass(frozen=True)
class CapturedForward:
    """The forward pass of a bucket: its `result` (n, ...), the captured ops and the plan.

    `index` (n,), on the model's device, says which sequences of the micro-batch these are.
    `sliced`: the part of the backward pass in which ops and plan have a slice of the positions.
    """

    index: Tensor
    result: Tensor
    ops: Sequence[CapturedOp]
    plan: Plan
    sliced: SlicedBackward | None = None

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
        _check_differentiable(parameters)
        self.function = function
        self._parameters = parameters
        self._autocast = autocast
        # Indices of the ops that handlers serve, by the structure of what was captured.
        self._per_sequence: dict[tuple[Any, ...], list[int]] = {}
        # Whether slices of gradients were right for it, likewise.
        self._takes_slices: dict[tuple[Any, ...], bool] = {}
        self._entries: EntriesCache = {}
        # Whether probes go back together, through a bucket and through a sequence alone.
        self.in_blocks = self.alone_in_blocks = True
        # Whether a first block was compared with a probe alone, likewise.
        self._compared = self._alone_compared = False
        # Whether sequences are compared with themselves alone; buckets so far, the next that is
        # looked at, and how many had a sequence apart.
        self.compares = False
        self._buckets = self._next_look = self._apart = 0

    def run(self, batch: Any) -> Tensor:
        """Run the function with a graph, nothing captured."""
        with NormGuard():
            return self._called(batch)

    def _called(self, batch: Any) -> Tensor:
        with torch.enable_grad(), self._autocast.on():
            return self.function(batch)

    def forward(self, batch: Any, index: Tensor) -> CapturedForward:
        """Run the sequences `index` (n,) of a micro-batch, which `batch` holds."""
        result, capture = self._captured(batch, len(index))
        self._check_alone(batch, result.detach())
        ops, counted = capture.ops, capture.counted
        if result.grad_fn is None:
            return CapturedForward(index, result, ops, Plan([], set()))
        # The structure is the model's, so it is examined once, and again where it is another:
        # on two sequences where those show the same calls, as they do in most models.
        # Where numbers of rows come of values, or hooks have a say, every bucket is examined, all
        # of it.
        structure = structure_of(ops)
        if self.compares and capture.hooked:
            generator = torch.Generator().manual_seed(0)
            direction = torch.randn(result.shape, generator=generator).to(result)
            linear_vector_jacobians(result, list(self._parameters.named.values()), direction)
        if counted or capture.hooked:
            own = per_sequence_ops(result, ops, whole=True)
        else:
            if structure not in self._per_sequence:
                examined = result, ops
                if len(index) > 2:
                    small = self._captured(batch_slice(batch, 0, 2), 2)
                    if structure_of(small[1].ops) == structure:
                        examined = small[0], small[1].ops
                own = self._per_sequence[structure] = per_sequence_ops(*examined)
                plan = make_plan(*examined, self._parameters, own)
                self._takes_slices[structure] = takes_slices(*examined, plan)
            own = self._per_sequence[structure]
        # A gradient is handed over before the hooks on it have run.
        own = [i for i in own if ops[i].output.node not in capture.hooked]
        plan = make_plan(result, ops, self._parameters, own)
        if not (counted or capture.hooked) and self._takes_slices[structure]:
            return CapturedForward(index, result, *sliced(result, ops, plan))
        return CapturedForward(index, result, ops, plan)

    def _captured(self, batch: Any, n: int) -> tuple[Tensor, Capture]:
        with Capture(self._parameters, n, HANDLERS, batch, self._entries) as capture:
            result = self._called(batch)
        if len(result) != n:
            raise InputError(f"model: {n} sequences gave a result of {len(result)} rows")
        return result, capture

    def _check_alone(self, batch: Any, result: Tensor) -> None:
        """Refuse a result that depends on the other sequences, in any bucket that is looked at.

        Those are the first ones, then ever fewer: one an eighth further on. A single sequence may
        be next to a kink of the model, where rounding decides.
        """
        self._buckets += 1
        n, wide = len(result), result.dtype in (torch.float32, torch.float64)
        looks = self.compares and self._buckets >= self._next_look
        if not (looks and wide) or self._autocast.enabled or n == 1:
            return
        self._next_look = self._buckets + 1 + self._buckets // 8
        gap = self._gap_alone(batch, result, n - 1)
        if gap is None:
            return
        self._apart += 1
        if self._apart > 1 or any(self._gap_alone(batch, result, row) for row in {0, (n - 1) // 2}):
            raise InputError(
                f"model: a sequence's results alone are {gap} from those in a batch, so "
                f"{BATCH_DEPENDENT}"
            )
        log.warning("model: a sequence's results alone are %s from those in its batch", gap)

    def _gap_alone(self, batch: Any, result: Tensor, row: int) -> str | None:
        with torch.no_grad(), self._autocast.on(), NormGuard():
            alone = self.function(batch_slice(batch, row, row + 1))
        own = result[row : row + 1]
        # A model of every position may leave out columns that are padding in all sequences.
        return distance(own, alone) if own.shape == alone.shape else None

    def backward(
        self, forward: CapturedForward, probes: int, block: int, probe_vectors: ProbeVectors
    ) -> Iterator[tuple[slice, list[Tensor | None]]]:
        """Blocks of probes, each with the output gradients of the ops that the plan needs.

        probe_vectors(index, probes): the gradient of `result`, (R, n, ...). The output gradients,
        by op, are (R, n, ...), as `ParamUse` takes them. Afterwards the pass is used up.
        """
        indices = forward.needed
        first = 0
        while indices and first < probes:
            span = slice(first, min(first + (block if self.in_blocks else 1), probes))
            given = probe_vectors(forward.index, span).to(forward.result.dtype)
            try:
                gradients = self._gradients(forward, given, span.stop < probes)
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
            for index, delta in gradients.items():
                if delta is not None:
                    deltas[index] = forward.ops[index].sequences_first(delta)
            del gradients
            yield span, deltas
            first = span.stop

    def gradients(
        self, result: Tensor, tensors: Sequence[Tensor], index: Tensor, factor: CovarianceFactor
    ) -> Iterator[list[Tensor | None]]:
        """Gradients of one sequence's probes, (R, *shape) each, in blocks; None where none comes.

        `result` (1, ...) is of the sequence `index` (1,). They are held for a block of probes.
        """
        first, block = 0, stored_sequences(sum(tensor.numel() for tensor in tensors))
        while first < factor.probes:
            span = slice(first, min(first + block, factor.probes))
            given = factor.probe_vectors(index, span).to(result.dtype)
            together = self.alone_in_blocks and len(given) > 1
            try:
                if together:
                    compared = not self._alone_compared
                    gradients = batched_vector_jacobians([result], tensors, [given], compared)
                    self._alone_compared = True
                else:
                    gradients = single_vector_jacobians([result], tensors, [given])
            except torch.OutOfMemoryError:
                if len(given) == 1:
                    raise
                block = -(-len(given) // 2)
                torch.cuda.empty_cache()
                continue
            except Exception as reason:  # whatever a model's own backward pass may raise
                if not together:
                    raise
                log.debug("probes one at a time where no rule is: %s", reason)
                self.alone_in_blocks = False
                continue
            yield gradients
            first = span.stop

    def _gradients(
        self, forward: CapturedForward, given: Tensor, retain: bool
    ) -> dict[int, Tensor | None] | None:
        """Gradients of a block by op; None where the model's backward pass takes one probe."""
        found: dict[int, Tensor | None] = {}
        edges, vectors = [get_gradient_edge(forward.result)], [given]
        if forward.sliced is not None:
            sliced, edges, vectors = forward.sliced.gradients(given)
            found |= sliced
        rest = [i for i in forward.needed if i not in found]
        if not rest:
            return found
        outputs = [forward.ops[i].output for i in rest]
        if len(given) == 1:
            single = torch.autograd.grad(
                edges, outputs, [v[0] for v in vectors], retain_graph=retain, allow_unused=True
            )
            deltas: list[Tensor | None] = [None if d is None else d[None] for d in single]
        else:
            try:
                deltas = batched_vector_jacobians(edges, outputs, vectors, not self._compared)
                self._compared = True
            except torch.OutOfMemoryError:
                raise
            except Exception as reason:  # whatever a model's own backward pass may raise
                log.debug("probes one at a time: %s", reason)
                self.in_blocks = False
                return None
        return found | dict(zip(rest, deltas, strict=True))


def ordered_results(forwards: Sequence[CapturedForward]) -> Tensor:
    """Return all sequences' results in their order, (N, ...), fp32 or wider, no graphs."""
    results = torch.cat([forward.result.detach() for forward in forwards])
    index = torch.cat([forward.index for forward in forwards])
    ordered = torch.empty_like(results).index_copy_(0, index, results)
    return ordered.to(torch.promote_types(ordered.dtype, torch.float32))


def _check_differentiable(parameters: Parameters) -> None:
    """Raise InputError where no gradient of a parameter can come, or none that has a square."""
    if torch.is_inference_mode_enabled():
        raise InputError("model: torch.inference_mode forbids gradients; call this outside of it")
    for name, parameter in parameters.named.items():
        if parameter.is_inference():
            raise InputError(
                f"model: '{name}' was made under torch.inference_mode, which forbids gradients"
            )
        if parameter.is_complex():
            raise InputError(
                f"model: '{name}' is complex; make it a real parameter (..., 2) that"
                " torch.view_as_complex reads"
            )
