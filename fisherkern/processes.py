"""Several processes at one call: `torch.distributed`, started by torchrun or by the user.

Every process calls the same function with the same arguments. Each works on its part of every
batch, sums are joined in the order of the processes, and all get the same result.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fisherkern.errors import InputError

# Whether this process works by itself though others are there.
_ALONE = contextvars.ContextVar("fisherkern_alone", default=False)
# Elements that are joined at once: the other processes' copies are held.
_AT_ONCE = 2**24


def world() -> int:
    """Return the number of processes that work together, 1 where there is only one."""
    joined = dist.is_available() and dist.is_initialized() and not _ALONE.get()
    return dist.get_world_size() if joined else 1


def rank() -> int:
    """Return this process's number, 0 where there is only one."""
    return dist.get_rank() if world() > 1 else 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this process work by itself in the block, where the others do not call the same."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


@contextlib.contextmanager
def joined_by_torchrun(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes where torchrun started this one; gives the device to work on.

    NCCL between GPUs, one per process of a machine; gloo otherwise.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def own_part(number: int, lengths: Tensor) -> slice:
    """Return this process's sequences of a batch: neighbours, with a fair share of positions.

    Args:
        number: The batch's place in the loader; shares are dealt round, so that what does not
            divide evenly falls on another process each time.
        lengths: (N,) positions of each sequence.
    """
    if world() == 1:
        return slice(0, len(lengths))
    share = (rank() + number) % world()
    ends = lengths.double().cumsum(0)
    total = float(ends[-1]) if len(ends) else 0.0
    middle = ends - lengths.double() / 2
    owner = (middle * world() / max(total, 1.0)).floor().clamp(max=world() - 1)
    own = (owner == share).nonzero()[:, 0]
    return slice(int(own[0]), int(own[-1]) + 1) if len(own) else slice(0, 0)


def joined_sum(values: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes, added in their order: the same bits in all."""
    if world() == 1:
        return values
    flat = values.contiguous().view(-1).clone()
    for part in flat.split(_AT_ONCE):
        every = [torch.empty_like(part) for _ in range(world())]
        dist.all_gather(every, part.clone())
        part.zero_()
        for own in every:
            part += own
    return flat.view(values.shape)


def gathered(value: Any) -> list[Any]:
    """Return every process's value, in their order."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def check_same(given: Mapping[str, Any]) -> None:
    """Raise InputError, in every process, unless all were given the same."""
    for number, other in enumerate(gathered(dict(given))):
        for name, value in given.items():
            if other[name] != value:
                raise InputError(
                    f"{name}: process {number} has another than process {rank()}; every process "
                    "takes the same arguments"
                )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """End the block in all processes where it fails in one, with that one's message.

    Nothing inside may wait for the other processes.
    """
    error: InputError | None = None
    try:
        yield
    except InputError as failed:
        if world() == 1:
            raise
        error = failed
    if world() == 1:
        return
    try:
        messages = gathered(None if error is None else str(error))
    except RuntimeError:
        raise InputError("another process ended before its time; see what it said") from None
    for number, message in enumerate(messages):
        if message is not None:
            raise error or InputError(f"process {number}: {message}")
