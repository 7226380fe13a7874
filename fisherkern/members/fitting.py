"""What alignment and the methods after a merge learn by: batches of a loader, and Adam."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern import processes
from fisherkern.adapters.batches import sequence_lengths, shared_part
from fisherkern.errors import InputError


def collect_batches(loader: Any, model: nn.Module) -> list[Any]:
    """Return the batches of `loader`, or of `loader(model)` if it is a function; at least one."""
    with processes.together() as same:
        found = loader(model) if callable(loader) else loader
        if not isinstance(found, Iterable) or isinstance(found, Tensor | str | dict):
            raise InputError(f"loader is a {type(found).__name__}, not an iterable of batches")
        found = list(found)
        if not found:
            raise InputError("loader gives no batch")
        if processes.world() > 1:
            same["loader"] = [sequence_lengths(batch).tolist() for batch in found]
    return found


def minimize(
    parameters: Sequence[Tensor],
    batches: Sequence[Any],
    loss_of: Callable[[Any], Tensor],
    *,
    steps: int,
    lr: float,
    whole: bool = False,
) -> list[float]:
    """Take `steps` steps of Adam, a batch each, around and around; return the loss before each.

    Several processes work on a batch, each on its sequences, over which the loss is a mean; or
    where it is no such mean (`whole`), each on the batch, so that their mean is its loss.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    for _, batch in zip(range(steps), itertools.cycle(batches), strict=False):
        # What waits for the others in the midst cannot tell them how it ended.
        with contextlib.nullcontext() if whole else processes.together(), torch.enable_grad():
            part, _, weight = (batch, slice(None), 1.0) if whole else shared_part(batch)
            loss = weight * loss_of(part)
            optimizer.zero_grad()
            loss.backward(inputs=list(parameters))
        losses.append(processes.average_gradients_(parameters, loss))
        if not math.isfinite(losses[-1]):
            raise InputError("loader: the loss of a batch is not finite")
        optimizer.step()
    return losses
