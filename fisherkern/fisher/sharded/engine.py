"""The engine for models with `DTensor`s: item tables by rows over the processes.

Every process runs its part of a micro-batch through the encoder. Hidden states are then joined:
the output layer's sums and choices are made by every process over its own items for all
sequences, and joined. Probes go back through each process's own part, and what they give to the
rows of a table is summed in the rows that the micro-batch names, then added by their owners.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.adapters.batches import batch_size, batch_slice, batch_take, sequence_lengths
from fisherkern.adapters.parameters import Parameters, ParamView
from fisherkern.adapters.sharded.models import ShardedHead, ShardedModel, is_sharded
from fisherkern.adapters.sharded.output_layer import CANNOT, OwnItems, seen_by, with_sharded_layer
from fisherkern.errors import InputError
from fisherkern.fisher.engine import Engine
from fisherkern.fisher.factors.item_table import ItemTable
from fisherkern.fisher.factors.samplers import check_softmax
from fisherkern.fisher.forward_backward import CapturedForward
from fisherkern.fisher.output_layers import OutputLayer, why_not_factored
from fisherkern.fisher.positions import PositionRows, counted_positions, position_targets
from fisherkern.fisher.running_sums import RunningSums, mean_of
from fisherkern.fisher.settings import Settings
from fisherkern.fisher.sharded.gathered_engine import GatheredEngine, by_rows
from fisherkern.fisher.sharded.table import ShardedItemTable
from fisherkern.processes import gathered, joined_sum, own_part, rank, together


def engine_of(model: ModelAdapter, settings: Settings) -> Engine:
    """Return the engine that suits a model's parameters."""
    if not is_sharded(model.module):
        return Engine(model, settings)
    known = model.library.item_tables(model.module)
    shards = ShardedModel(model.module, known, model.num_items)
    if shards.tables:
        return ShardedEngine(model, settings, shards)
    return GatheredEngine(model, settings, shards)


class ShardedEngine(GatheredEngine):
    """The engine for a model whose item tables have their rows over the processes."""

    shared_out = True

    def __init__(self, model: ModelAdapter, settings: Settings, shards: ShardedModel) -> None:
        if settings.reduction == "batchwise":
            raise InputError(
                "reduction: 'batchwise' needs all logits, which a sharded table spares"
            )
        super().__init__(model, settings, shards)
        self.given = model
        rows = {
            name: shard.rows
            for name, shard in shards.tables.items()
            if name in self.parameters.named
        }
        self.rows = RunningSums(rows)
        self.row_sums = {name: self.rows.recent[name].view(own.shape) for name, own in rows.items()}
        # Of a micro-batch, the sums of the rows at hand stand beside.
        self.fisher = dict(self.sums.recent)
        self.head: ShardedHead | None = None
        self.own: OwnItems | None = None
        # Where the squares of the own items' biases are added up.
        self.bias_sums: Tensor | None = None
        self.biases: RunningSums | None = None
        self._number = 0

    def _start(self, batch: Any) -> None:
        """Find the output layer, of which no process has all."""
        model = with_sharded_layer(self.shards, self.given, batch)
        if self.every:
            model = model.at_every_position()
        assert model.head is not None and model.all_hidden is not None
        self.head, self.own = self.shards.head(model.head), OwnItems.of(self.shards, model)
        self.model = dataclasses.replace(seen_by(self.shards, model), looked_for=True)
        self.num_items, self.by_logits = self.head.num_items, False
        encode = self.model.all_hidden if self.every else self.model.encode
        assert encode is not None
        self.runner = self._runner(encode)
        self._start_bias(self.head.bias, self.own)

    def _start_bias(self, bias: Any, own: OwnItems) -> None:
        """Have sums for the biases of the own items, which may be rows of a table cut elsewhere."""
        if bias is None or own.bias is None:
            return
        if own.bias_table is not None:
            name = own.bias_table[0]
            if name in self.row_sums:
                self.biases = RunningSums({name: own.bias})
                self.bias_sums = self.biases.recent[name]
            return
        view = self.parameters.view_of(bias)
        if view is None and bias.requires_grad:
            raise InputError(f"model: its output bias is computed, {CANNOT}")
        if view is not None:
            self.bias_sums = view.of(self.fisher[view.name])[own.numbers.start : own.numbers.stop]

    def add_batch(self, batch: Any, first: int) -> int:
        """Add a loader's batch, each process its part; see `Engine.add_batch`."""
        batch = self.model.prepared(batch)
        n = batch_size(batch)
        if n == 0:
            return 0
        if first == 0:
            self._start(batch)
        ids = torch.arange(first, first + n, device=self.device)
        for part, start, stop in self.schedule.micro_batches(batch, n):
            self.add(part, ids[start:stop])
        for sums in (self.sums, self.rows, self.biases):
            if sums is not None:
                sums.end_batch()
        self._number += 1
        return n

    def add(self, batch: Any, sequence_ids: Tensor) -> None:
        """Add the sequences of a micro-batch, the same in all processes."""
        self._fetch(batch)
        with self.autocast.off():
            layer = self._output_layer()
            with together():
                forwards = self._forward(batch, len(sequence_ids), layer)
                if (reason := why_not_factored(layer, forwards)) is not None:
                    for forward in forwards:
                        states = forward.result.detach().flatten(1).sum(dim=1)
                        check_softmax(states, sequence_ids[forward.index])
                    raise InputError(f"model: {reason}, {CANNOT}")
            if self.every:
                self._add_positions(batch, forwards, layer, sequence_ids)
            else:
                target = self.model.targets(batch) if self.settings.sampler == "target" else None
                self._add_encoded(batch, forwards, layer, sequence_ids, target)
        self._spread()

    def _fetch(self, batch: Any) -> None:
        """Have the rows at hand that a micro-batch names, and sums for them."""
        self.shards.fetch_for(batch, self.head)
        self.parameters.stand_in(self.shards.values)
        for name, total in self.row_sums.items():
            self.fisher[name] = total.new_zeros(self.shards.values[name].numel())

    def _spread(self) -> None:
        """Add what the rows at hand got to the sums of those that own them."""
        for name, total in self.row_sums.items():
            rows, shard = self.shards.rows[name], self.shards.tables[name]
            found = joined_sum(self.fisher[name]).view(len(rows), *shard.shape[1:])
            own = shard.owns(rows)
            total[rows[own] - shard.first] += found[own]

    def _output_layer(self) -> OutputLayer:
        """Return this process's part of the output layer."""
        assert self.head is not None and self.own is not None
        weight, bias = self.own.weight, self.own.bias
        return OutputLayer(
            weight,
            bias,
            self._view(self.head.table, weight),
            None if self.bias_sums is None else self._view(self._bias_name(), bias),
        )

    def _view(self, name: str, like: Tensor | None) -> ParamView | None:
        assert like is not None
        return ParamView(name, 0, tuple(like.shape)) if name in self.parameters.named else None

    def _bias_name(self) -> str:
        assert self.head is not None and self.own is not None
        if self.own.bias_table is not None:
            return self.own.bias_table[0]
        view = self.parameters.view_of(self.head.bias)
        assert view is not None
        return view.name

    def _output_sums(self, layer: OutputLayer) -> tuple[Tensor | None, Tensor | None]:
        assert self.head is not None and self.own is not None
        total = self.row_sums.get(self.head.table)
        if total is not None:
            own = self.own.numbers
            start = self.head.first + own.start - self.shards.tables[self.head.table].first
            total = total[max(start, 0) :][: len(own)]
        return total, self.bias_sums

    def _table(self, layer: OutputLayer) -> ItemTable:
        assert self.head is not None and self.own is not None
        looked_up = self.shards.rows[self.head.table] - self.head.first
        table = ShardedItemTable(
            self.num_items, self.own.numbers.start, self.own.weight, self.own.bias, looked_up
        )
        inside = (looked_up >= 0) & (looked_up < self.num_items)
        table.fetch(torch.cat([looked_up[inside], looked_up.new_zeros(1)]))
        return table

    def _forward(self, batch: Any, n: int, layer: OutputLayer | None) -> list[CapturedForward]:
        """Forward passes of this process's sequences, perhaps none."""
        own = own_part(self._number, sequence_lengths(batch))
        if own.start == own.stop:
            return []
        part = batch_slice(batch, own.start, own.stop)
        assert layer is not None
        found = []
        for forward in super()._forward(part, own.stop - own.start, layer):
            if why_not_factored(layer, [forward]) is None or len(forward.index) == 1:
                found.append(forward)
                continue
            # As many sequences as positions are told apart one by one.
            for i in forward.index.tolist():
                alone = torch.tensor([i], device=self.device)
                found.append(self.runner.forward(batch_slice(part, i, i + 1), alone))
        return [dataclasses.replace(f, index=f.index + own.start) for f in found]

    def _hidden(self, forwards: list[CapturedForward], n: int) -> Tensor:
        """Return the hidden states of all processes' sequences."""
        h = self._no_states(n)
        for forward in forwards:
            h[forward.index] = forward.result.detach().to(h.dtype)
        return joined_sum(h)

    def _no_states(self, n: int) -> Tensor:
        assert self.head is not None
        rows = self.shards.tables[self.head.table].rows
        return rows.new_zeros(
            n, rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32)
        )

    def _add_positions(
        self,
        batch: Any,
        forwards: list[CapturedForward],
        layer: OutputLayer | None,
        sequence_ids: Tensor,
    ) -> None:
        """Every position that counts; processes with fewer buckets take part in the joins."""
        assert layer is not None
        for number in range(max(gathered(len(forwards)))):
            forward = forwards[number] if number < len(forwards) else None
            with together():
                own = None if forward is None else self._rows(batch, forward, sequence_ids)
            states, first = self._joined_rows(own)
            if not len(states.ids):
                continue
            stats, factor = self._factored(states.h, layer, states.ids, states.target)
            for weight in states.weight.unique().tolist():
                self._add_output(layer, stats, factor, states.weight == weight, weight)
            if factor.mass is not None:
                self.mass += (factor.mass * states.weight).double().sum()
            if factor.kept is not None:
                self.kept += (factor.kept * states.weight).double().sum()
            if forward is None or own is None or not len(own[0]):
                continue
            span = slice(first, first + len(own[0]))
            own_stats = dataclasses.replace(stats, h=stats.h[span])
            self._probe_positions(batch, forward, layer, own[0], own_stats, factor.after(first))

    def _rows(
        self, batch: Any, forward: CapturedForward, sequence_ids: Tensor
    ) -> tuple[PositionRows, Tensor, Tensor | None]:
        """Return the positions of a bucket that count, their hidden states and targets."""
        result = forward.result.detach()
        if result.dim() != 3:
            raise InputError("positions: the model gives states of the last position alone")
        part = batch_take(batch, forward.index)
        counted = counted_positions(self.model, part, (result.shape[0], result.shape[1]))
        rows = PositionRows.of(counted, sequence_ids[forward.index], self.settings)
        self.counted = int(counted.sum())
        self.reached |= forward.plan.reached
        target = None
        if self.settings.sampler == "target":
            target = position_targets(self.model, part, rows)
        return rows, result[rows.sequence, rows.place], target

    def _joined_rows(
        self, own: tuple[PositionRows, Tensor, Tensor | None] | None
    ) -> tuple[_States, int]:
        """Return the positions of all processes, and the number of the first of this one's."""
        counts = gathered((0, 0) if own is None else (len(own[0]), self.counted))
        self.num_positions += sum(counted for _, counted in counts)
        first, total = sum(n for n, _ in counts[: rank()]), sum(n for n, _ in counts)
        h = self._no_states(total)
        ids = torch.zeros(total, dtype=torch.int64, device=h.device)
        target, weight = ids.clone(), ids.double()
        if own is not None:
            rows, states, targets = own
            span = slice(first, first + len(rows))
            h[span], ids[span], weight[span] = states.to(h.dtype), rows.ids, rows.weight
            if targets is not None:
                target[span] = targets
        found = _States(*(joined_sum(part) for part in (h, ids, weight, target)))
        if self.settings.sampler != "target":
            found = dataclasses.replace(found, target=None)
        return found, first

    def of_few(self, batch: Any) -> Engine:
        """Return an engine for the same model with the items alone that a few sequences name."""
        assert self.head is not None and self.own is not None
        assert self.model.all_hidden is not None
        self._fetch(batch)
        rows = self.shards.rows[self.head.table] - self.head.first
        inside = ((rows >= 0) & (rows < self.num_items)).nonzero()[:, 0]
        span = slice(int(inside[0]), int(inside[-1]) + 1)
        stand_ins = self.shards.stand_ins()
        weight, bias = stand_ins[self.head.table][span], self.head.bias
        if bias is not None:
            items = rows[span]
            if self.own.bias_table is not None:
                name, first = self.own.bias_table
                bias = self.shards.tables[name].fetched(items + first).clone()
            else:
                bias = bias.detach()[items]
            if self.bias_sums is not None:
                stand_ins[self._bias_name()] = bias.requires_grad_()
        hidden = self.model.all_hidden

        def logits(few: Any) -> Tensor:
            return torch.nn.functional.linear(hidden(few), weight, bias)

        model = dataclasses.replace(self.model, all_logits=logits, head=lambda: (weight, bias))
        parameters = Parameters(self.given.module, stand_ins=stand_ins)
        engine = Engine(model, self.settings, parameters)
        engine.by_logits, engine.runner = False, engine._runner(self.runner.function)
        engine.num_items, engine.fallback = len(weight), set(self.fallback)
        return engine

    def join(self) -> None:
        """Add up what the processes have of parameters that all of them hold."""
        self.sums.join()
        self._join_reached()

    def _summed(self) -> Mapping[str, Tensor]:
        named, tables = self.parameters.named, self.shards.tables
        return {name: own for name, own in named.items() if name not in tables}

    def finish(self, num_sequences: int) -> dict[str, Tensor]:
        """As `Engine.finish`, each process its rows of the tables."""
        assert self.own is not None
        totals = {name: self.sums.total(name) for name in self.sums.recent}
        totals |= {name: self.rows.total(name) for name in self.rows.recent}
        if self.own.bias_table is not None and self.biases is not None:
            name, first = self.own.bias_table
            own = self.biases.total(name)
            moved = self.shards.tables[name].moved(own, first + self.own.numbers.start)
            totals[name] = totals[name] + moved
        with together():
            self._check(totals)
        named = dict(self.given.module.named_parameters())
        found = {name: p.detach() for name, p in self.parameters.empty.items()}
        for name, parameter in self.parameters.named.items():
            rows = self.row_sums.get(name)
            dtype = self.fisher[name].dtype if rows is None else rows.dtype
            mean = mean_of(totals[name], num_sequences, dtype)
            if rows is None:
                found[name] = self._laid_out(name, mean.view(parameter.shape))
            else:
                found[name] = by_rows(mean.view(rows.shape), named[name])
        return found


@dataclasses.dataclass(frozen=True)
class _States:
    """Hidden states h (M, D) with their ids, weights and targets, (M,) each."""

    h: Tensor
    ids: Tensor
    weight: Tensor
    target: Tensor | None
