"""What alignment and the methods after a merge learn by: batches of a loader, and Adam."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.errors import InputError


def collect_batches(loader: Any, model: nn.Module) -> list[Any]:
    """Return the batches of `loader`, or of `loader(model)` if it is a function; at least one."""
    found = loader(model) if callable(loader) else loader
    if not isinstance(found, Iterable) or isinstance(found, Tensor | str | dict):
        raise InputError(f"loader is a {type(found).__name__}, not an iterable of batches")
    found = list(found)
    if not found:
        raise InputError("loader gives no batch")
    return found


def minimize(
    parameters: Sequence[Tensor],
    batches: Sequence[Any],
    loss_of: Callable[[Any], Tensor],
    *,
    steps: int,
    lr: float,
) -> list[float]:
    """Take `steps` steps of Adam, a batch each, around and around; return the loss before each."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    for _, batch in zip(range(steps), itertools.cycle(batches), strict=False):
        with torch.enable_grad():
            loss = loss_of(batch)
        if not torch.isfinite(loss):
            raise InputError("loader: the loss of a batch is not finite")
        optimizer.zero_grad()
        loss.backward(inputs=list(parameters))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
