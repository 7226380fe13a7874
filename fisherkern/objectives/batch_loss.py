"""The loss of a batch that several processes share: each computes its rows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fisherkern.encoders import Batch, SequenceEncoder
from fisherkern.objectives.base import Objective
from fisherkern.objectives.scoring import LOCAL_SLICE
from fisherkern.processes import peers_alive, rank, world


class BatchLoss(nn.Module):
    """An objective as a module, whose mean over the processes is the loss of the whole batch.

    Every process makes the same draws for the whole batch and computes its loss, except that the
    encoder's `states` and `encode` run on this process's rows, and the results are gathered, and
    that `softmax_loss` scores this process's places: exact for every objective, in-batch negatives
    included. `methods` stand before the model's own of the same names.
    """

    def __init__(
        self,
        model: SequenceEncoder,
        objective: Objective,
        modules: Mapping[str, nn.Module],
        methods: Mapping[str, Callable[..., Tensor]],
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.trained = nn.ModuleList(modules.values())
        self.methods = dict(methods)
        if world() > 1:
            own: dict[str, Callable[..., Tensor]]
            own = {"encode": model.encode, "states": model.states, **self.methods}
            rows = _Rows()
            self.methods = {name: functools.partial(rows, own[name]) for name in own}

    def forward(
        self, tokens: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Return the loss of `tokens` (N, T), 0-dim; its terms, weighted; and their targets."""
        before = LOCAL_SLICE.set(local_slice if world() > 1 else None)
        try:
            with _shadowed(self.model, self.methods):
                terms = self.objective.terms(self.model, tokens, generator)
        finally:
            LOCAL_SLICE.reset(before)
        parts = torch.stack([term.weight * term.loss for term in terms])
        return parts.sum(), parts.detach(), [term.targets if term.weight else 0 for term in terms]


def local_slice(count: int) -> tuple[slice, float]:
    """Return this process's share of `count` places and its mean's weight: `LOCAL_SLICE`."""
    share = -(-count // world())
    first, last = rank() * share, min((rank() + 1) * share, count)
    if first < last:
        return slice(first, last), (last - first) * world() / count
    # This process has no position left; it scores one with weight 0 so that DDP does not hang.
    return slice(0, 1), 0.0


@contextlib.contextmanager
def _shadowed(model: nn.Module, methods: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Let `methods` stand before the model's own of the same names, on this object alone."""
    for name, method in methods.items():
        setattr(model, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(model, name)


class _Rows:
    """Calls a method of the encoder on this process's rows of its arguments; gathers all rows."""

    def __init__(self) -> None:
        # Apart from the averaging of gradients, which goes on while gathered rows' gradients are
        # added up: the two need no common order then.
        self.group = dist.new_group()
        self.inside = False

    def __call__(
        self, method: Callable[..., Tensor], batch: Batch, *more: Any, **named: Any
    ) -> Any:
        if self.inside:  # `encode` calls `states`, by now on rows of its own
            return method(batch, *more, **named)
        history = batch["history"] if isinstance(batch, Mapping) else batch
        count = len(history)
        share = -(-count // world())
        # Equal shares, as gathering needs; what stands beyond the last row is cut off again.
        rows = (torch.arange(share) + rank() * share).clamp(max=count - 1).to(history.device)

        def own(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: own(entry) for name, entry in value.items()}
            return value[rows] if isinstance(value, Tensor) else value

        self.inside = True
        try:
            result = method(*map(own, (batch, *more)), **{n: own(v) for n, v in named.items()})
        finally:
            self.inside = False
        rows = _GatherRows.apply(result, self.group)  # type: ignore[no-untyped-call]
        return rows[:count]


class _GatherRows(torch.autograd.Function):
    """All processes' rows, one process's after another's.

    Not `torch.distributed.nn.functional.all_gather`: PyTorch deprecates it, and it adds bfloat16
    gradients up in bfloat16.

    What goes back to a row is the sum of its gradients in all processes' losses: averaged over
    the processes with everything else, that is its gradient in the mean of their losses.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(own) for _ in range(world())]
        with peers_alive():
            dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].float() if gradients[0].dtype == torch.bfloat16 else gradients[0]
        total = total.contiguous().clone()
        with peers_alive():
            dist.all_reduce(total, group=ctx.group)
        return total.chunk(world())[rank()].to(gradients[0].dtype), None
