"""Capture, factor, probe, accumulate: the sums of F over the sequences of a loader's batches."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.adapters.batches import batch_size, batch_slice, batch_take, takes
from fisherkern.adapters.parameters import Parameters
from fisherkern.errors import InputError
from fisherkern.fisher.autocast import Autocast
from fisherkern.fisher.batchwise import add_batchwise_
from fisherkern.fisher.factors.factor import CovarianceFactor
from fisherkern.fisher.factors.item_table import ItemTable
from fisherkern.fisher.factors.logit_samplers import LogitStats, factor_logits
from fisherkern.fisher.factors.samplers import SoftmaxStats, check_softmax, factor_covariance
from fisherkern.fisher.forward.kept_tensors import fresh_passes
from fisherkern.fisher.forward.plain_run import NormGuard
from fisherkern.fisher.forward_backward import (
    CapturedForward,
    ForwardBackward,
    ordered_results,
)
from fisherkern.fisher.output_layers import OutputLayer, why_not_factored
from fisherkern.fisher.plan import TiedEmbeddingGrad, tied_embedding_grads
from fisherkern.fisher.positions import (
    PositionProbes,
    PositionRows,
    TiedPositionGrad,
    counted_positions,
    position_targets,
)
from fisherkern.fisher.running_sums import RunningSums, float64_sum, mean_of
from fisherkern.fisher.schedule import Schedule
from fisherkern.fisher.settings import Settings
from fisherkern.processes import Dealer, gathered, joined_sum

log = logging.getLogger("fisherkern")


# The tied gradients of one forward pass, by index in its plan.
Tied = Callable[[CapturedForward], Mapping[int, TiedEmbeddingGrad | TiedPositionGrad]]


class Engine:
    """Sums Σ_n F_n over the batches it is given; `fisher` holds flat sums by parameter name."""

    shared_out = False  # whether item tables have their rows over the processes

    def __init__(
        self, model: ModelAdapter, settings: Settings, parameters: Parameters | None = None
    ) -> None:
        """`parameters`: those that are asked for; all by default."""
        self.model = model
        self.settings = settings
        self.parameters = Parameters(model.module) if parameters is None else parameters
        self.sums = RunningSums(self._summed())
        self.fisher = self.sums.recent
        self.device = model.device
        self.schedule = dataclasses.replace(Schedule.of(self.device), micro_batch=settings.chunk)
        self.autocast = Autocast.of(self.device)
        # From the batch to h where the output layer allows it, else to the logits.
        self.by_logits = True
        self.runner = self._runner(model.logits)
        self.reached: set[str] = set()
        self.fallback: set[str] = set()
        self.probes = self.num_items = 0
        # Sums over the sequences, on the device: a number read back is waited for.
        self.mass = torch.zeros((), dtype=torch.float64, device=self.device)
        self.kept = torch.zeros_like(self.mass)
        # Positions that count, where it is not the last of each sequence.
        self.every = settings.positions != "last"
        self.num_positions = torch.zeros_like(self.mass)
        self.dealer = Dealer()

    def _summed(self) -> Mapping[str, Tensor]:
        """Return the parameters whose sums every process has whole."""
        return self.parameters.named

    def _runner(self, function: Callable[[Any], Tensor]) -> ForwardBackward:
        return ForwardBackward(function, self.parameters, self.autocast)

    def _start(self, batch: Any) -> None:
        """Find the output layer on the first batch, and check what the model is asked."""
        if self.settings.check and not self.shared_out:
            self.model = fresh_passes(self.model, batch_slice(batch, 0, 2), self.autocast)
        with self.autocast.on(), torch.no_grad(), NormGuard():
            self.model = self.model.with_output_layer(batch)
            self.num_items = self.model.logits(batch_slice(batch, 0, 1)).shape[1]
        if self.every:
            self.model = self.model.at_every_position()
        encode = self.model.all_hidden if self.every else self.model.encode
        self.by_logits = self.settings.reduction == "batchwise" or encode is None
        self.runner = self._runner(self._logits if encode is None or self.by_logits else encode)
        self.runner.compares = self.settings.check and not self.shared_out

    @property
    def _logits(self) -> Callable[[Any], Tensor]:
        return self.model.all_logits if self.every else self.model.logits

    def add_batch(self, batch: Any, first: int) -> int:
        """Add a loader's batch where it is this process's; returns its number of sequences.

        `first` is the id of the first one.
        """
        n = batch_size(batch)
        if n == 0:
            return 0
        own = takes(self.dealer, batch)
        if own or first == 0:
            batch = self.model.prepared(batch)
        if first == 0:
            self._start(batch)
        if not own:
            return n
        # Ids, by which random numbers are keyed, are places in the loader.
        device = next(iter(self.fisher.values())).device
        ids = torch.arange(first, first + n, device=device)
        if self.settings.reduction == "batchwise":
            reached, mass = add_batchwise_(
                self.fisher, self.model, self.parameters, self.settings, batch, ids
            )
            self.reached |= reached
            if mass is not None:
                self.mass += mass.double().sum()
        else:
            for part, start, stop in self.schedule.micro_batches(batch, n):
                self.add(part, ids[start:stop])
        self.sums.end_batch()
        return n

    def of_few(self, batch: Any) -> Engine:
        """Return the engine whose gradients a few sequences are compared by."""
        return self

    def join(self) -> None:
        """Add up what several processes have, in their order; all have the sums afterwards."""
        self.sums.join()
        for total in (self.mass, self.kept, self.num_positions):
            total.copy_(joined_sum(total))
        self._join_reached()

    def _join_reached(self) -> None:
        every = gathered((self.reached, self.probes))
        self.reached = set().union(*(reached for reached, _ in every))
        self.probes = max(probes for _, probes in every)

    def add(self, batch: Any, sequence_ids: Tensor) -> None:
        """Add the sequences of a micro-batch; `sequence_ids` (N,) int64."""
        with self.autocast.off():
            layer = None if self.by_logits else self._output_layer()
            forwards = self._forward(batch, len(sequence_ids), layer)
            if layer is not None and (reason := why_not_factored(layer, forwards)) is not None:
                log.warning("%s; taking the slower path through the logits", reason)
                forwards.clear()
                layer, self.by_logits = None, True
                self.runner = self._runner(self._logits)
                forwards = self._forward(batch, len(sequence_ids), layer)
            if self.every:
                self._add_positions(batch, forwards, layer, sequence_ids)
                return
            target = self.model.targets(batch) if self.settings.sampler == "target" else None
            if layer is not None:
                self._add_encoded(batch, forwards, layer, sequence_ids, target)
            else:
                self._add_logits(batch, forwards, sequence_ids, target)

    def _output_layer(self) -> OutputLayer:
        assert self.model.head is not None
        weight, bias = self.model.head()
        view_of = self.parameters.view_of
        fixed, scaling = self.model.fixed_rows, self.model.row_scaling
        own = view_of(weight if scaling is None else scaling.table)
        return OutputLayer(weight, bias, own, view_of(bias), fixed, scaling)

    def _forward(self, batch: Any, n: int, layer: OutputLayer | None) -> list[CapturedForward]:
        """Return a forward pass of each length bucket of the micro-batch."""
        width = None if layer is None else layer.weight.shape[1]
        probes = self.settings.most_probes(width) if self.runner.in_blocks else 1
        buckets = list(self.schedule.length_buckets(self.model, batch, n, probes))
        return [self.runner.forward(part, index.to(self.device)) for part, index in buckets]

    def _add_encoded(
        self,
        batch: Any,
        forwards: list[CapturedForward],
        layer: OutputLayer,
        sequence_ids: Tensor,
        target: Tensor | None,
    ) -> None:
        """Add the output layer in closed form, the encoder by probes from its hidden states."""
        h = self._hidden(forwards, len(sequence_ids))
        stats, factor = self._factored(h, layer, sequence_ids, target)
        self._add_output(layer, stats, factor, slice(None), 1.0)

        def tied(forward: CapturedForward) -> dict[int, TiedEmbeddingGrad]:
            param = layer.weight_param
            grads = tied_embedding_grads(forward.plan, forward.index, param, stats, factor)
            return {i: layer.tied(grad, stats.table.weight) for i, grad in grads.items()}

        self._probe(batch, forwards, factor, tied)

    def _hidden(self, forwards: list[CapturedForward], n: int) -> Tensor:
        """Return the hidden states of the micro-batch's n sequences."""
        return ordered_results(forwards)

    def _factored(
        self, h: Tensor, layer: OutputLayer, sequence_ids: Tensor, target: Tensor | None
    ) -> tuple[SoftmaxStats, CovarianceFactor]:
        stats = SoftmaxStats.of(h, self._table(layer), sequence_ids, target, self.settings)
        check_softmax(stats.lse, sequence_ids)
        return stats, layer.of_rows(self._factor(stats))

    def _table(self, layer: OutputLayer) -> ItemTable:
        return layer.table()

    def _factor(self, stats: SoftmaxStats | LogitStats) -> CovarianceFactor:
        """Return the factor that the sampler asks for."""
        if isinstance(stats, LogitStats):
            return factor_logits(stats, self.settings)
        return factor_covariance(stats, self.settings)

    def _add_output(
        self,
        layer: OutputLayer,
        stats: SoftmaxStats,
        factor: CovarianceFactor,
        rows: Any,
        weight: float,
    ) -> None:
        """Add the closed form of the output layer over some rows, times a weight."""
        params = layer.weight_param, layer.bias_param
        self.reached |= {p.name for p in params if p is not None}
        sums, sums_bias = self._output_sums(layer)
        if sums is None and sums_bias is None:
            return
        layer.add_square_(sums, sums_bias, stats, factor, rows, weight)

    def _output_sums(self, layer: OutputLayer) -> tuple[Tensor | None, Tensor | None]:
        """Where the squares of W and b are added up, None for what has no parameter."""
        weight, bias = layer.weight_param, layer.bias_param
        return (
            None if weight is None else weight.of(self.fisher[weight.name]),
            None if bias is None else bias.of(self.fisher[bias.name]),
        )

    def _add_positions(
        self,
        batch: Any,
        forwards: list[CapturedForward],
        layer: OutputLayer | None,
        sequence_ids: Tensor,
    ) -> None:
        """Every position that counts: its output layer in closed form, probes over all."""
        for forward in forwards:
            result = forward.result.detach()
            result = result.to(torch.promote_types(result.dtype, torch.float32))
            if result.dim() != 3:
                raise InputError(
                    "positions: the model gives logits of the last position alone, "
                    f"{tuple(result.shape)}"
                )
            part = batch_take(batch, forward.index)
            counted = counted_positions(self.model, part, (result.shape[0], result.shape[1]))
            rows = PositionRows.of(counted, sequence_ids[forward.index], self.settings)
            self.num_positions += counted.sum()
            if not len(rows):
                self.reached |= forward.plan.reached
                continue
            target = None
            if self.settings.sampler == "target":
                target = position_targets(self.model, part, rows)
            own = result[rows.sequence, rows.place]
            if layer is None:
                log_stats = LogitStats(torch.log_softmax(own, dim=1), rows.ids, target)
                check_softmax(log_stats.log_p.amax(dim=1), rows.ids)
                factor, stats = self._factor(log_stats), None
            else:
                stats, factor = self._factored(own, layer, rows.ids, target)
                for weight in rows.weight.unique().tolist():
                    self._add_output(layer, stats, factor, rows.weight == weight, weight)
            self._probe_positions(batch, forward, layer, rows, stats, factor)

    def _probe_positions(
        self,
        batch: Any,
        forward: CapturedForward,
        layer: OutputLayer | None,
        rows: PositionRows,
        stats: SoftmaxStats | None,
        factor: CovarianceFactor,
    ) -> None:
        alone = self.settings.sampler == "exact"
        probes = PositionProbes(rows, factor, forward.index, self.settings.seed, alone)

        def tied(forward: CapturedForward) -> dict[int, Any]:
            if layer is None or layer.weight_param is None or stats is None:
                return {}
            return {
                i: TiedPositionGrad(grad, probes, stats, layer.weight_param, layer.row_scaling)
                for i, grad in enumerate(forward.plan.grads)
                if grad.param.name == layer.weight_param.name
            }

        shared = CovarianceFactor(
            probes.count,
            probes.vectors,
            factor.tied_cross_term,
            mass=None if factor.mass is None else factor.mass * rows.weight,
            kept=None if factor.kept is None else factor.kept * rows.weight,
        )
        self._probe(batch, [forward], shared, tied)

    def _add_logits(
        self,
        batch: Any,
        forwards: list[CapturedForward],
        sequence_ids: Tensor,
        target: Tensor | None,
    ) -> None:
        """Everything by probes from the logits."""
        z = ordered_results(forwards)
        if z.dim() != 2:
            raise InputError(f"model: its logits must be (N, V), got {tuple(z.shape)}")
        stats = LogitStats(torch.log_softmax(z, dim=1), sequence_ids, target)
        check_softmax(stats.log_p.amax(dim=1), sequence_ids)
        self._probe(batch, forwards, self._factor(stats), lambda forward: {})

    def _probe(
        self, batch: Any, forwards: list[CapturedForward], factor: CovarianceFactor, tied: Tied
    ) -> None:
        """Every probe's backward pass, each parameter's squares added to its sum."""
        self.probes = max(self.probes, factor.probes)
        if factor.mass is not None:
            self.mass += factor.mass.double().sum()
        if factor.kept is not None:
            self.kept += factor.kept.double().sum()
        while forwards:
            forward = forwards.pop()  # its graph goes with it
            self.reached |= forward.plan.reached - forward.plan.fallback
            lookups = tied(forward)
            sums = [grad.param.of(self.fisher[grad.param.name]) for grad in forward.plan.grads]
            block = self.schedule.probe_block(forward.elements, forward.result.numel())
            blocks = self.runner.backward(forward, factor.probes, block, factor.probe_vectors)
            for span, deltas in blocks:
                for i, (grad, total) in enumerate(zip(forward.plan.grads, sums, strict=True)):
                    if i in lookups:
                        lookups[i].add_square_(total, span, deltas)
                    else:
                        grad.add_square_(total, deltas)
            if forward.plan.fallback:
                self._fall_back(batch, forward, factor)

    def _fall_back(self, batch: Any, forward: CapturedForward, factor: CovarianceFactor) -> None:
        """Per-sequence autograd for the parameters that no handler serves."""
        names = sorted(forward.plan.fallback)
        if new := forward.plan.fallback - self.fallback:
            self.fallback |= new
            names_text = ", ".join(sorted(new))
            log.warning("no rule for %s: a backward pass for each sequence alone", names_text)
        tensors = [self.parameters.named[name] for name in names]
        for i in forward.index.tolist():
            result = self.runner.run(batch_slice(batch, i, i + 1))
            index = torch.tensor([i], device=result.device)
            for gradients in self.runner.gradients(result, tensors, index, factor):
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is not None:
                        fisher = self.fisher[name]
                        fisher += gradient.to(fisher.dtype).square().sum(dim=0).flatten()
                        self.reached.add(name)

    def finish(self, num_sequences: int) -> dict[str, Tensor]:
        """Return the mean over sequences, by parameter and in its shape; each is accounted for."""
        named, sums = self.parameters.named, {name: self.sums.total(name) for name in self.fisher}
        self._check(sums)
        means = {
            name: mean_of(sums[name], num_sequences, self.fisher[name].dtype).view(p.shape)
            for name, p in named.items()
        }
        return means | {name: p.detach().float() for name, p in self.parameters.empty.items()}

    def _check(self, sums: Mapping[str, Tensor]) -> None:
        missing = sorted(set(sums) - self.reached)
        if missing:
            raise InputError(
                f"model: {', '.join(missing)} received no gradient from the next-item logits;"
                " freeze with requires_grad_(False) what the prediction does not use"
            )
        totals = torch.stack([float64_sum(total).to(self.device) for total in sums.values()])
        for name, total in zip(sums, totals.tolist(), strict=True):
            if not math.isfinite(total):
                raise InputError(f"model: the Fisher of '{name}' is not finite")
