"""Several processes at one call: `torch.distributed`, started by torchrun or by the user.

Every process calls the same function with the same arguments. Each works on its batches, sums are
joined in the order of the processes, and all get the same result. What one process says to the
others is told at the end of a block, `together`, so that all of them end where one fails.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.provenance import source_sha256

# Whether this process works by itself though others are there.
_ALONE = contextvars.ContextVar("fisherkern_alone", default=False)
# Elements that are joined at once.
_AT_ONCE = 2**24
# What a score may differ by between processes, as rounding makes it: a share of the larger one.
_ROUNDING = 1e-6
ENDED = "another process ended before its time; see what it said"


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


def started_by_torchrun() -> int:
    """Return how many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_of_torchrun() -> bool:
    """Return whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def joined_by_torchrun(kind: str) -> Iterator[None]:
    """Join the other processes where torchrun started this one.

    `kind` is a device's: NCCL joins what is on GPUs, one per process of a machine; gloo the rest.
    """
    if started_by_torchrun() == 1:
        yield
        return
    if kind == "cuda":
        own, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= here:
            raise InputError(f"torchrun: process {own} of this machine has no GPU of {here}")
        torch.cuda.set_device(own)
    signal.signal(signal.SIGTERM, _stop_at_once)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise InputError(f"torchrun: the processes could not be joined: {error}") from error
    try:
        yield
    finally:
        # Whoever ends first lets torchrun stop the others, who have a word of their own to say.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.destroy_process_group()


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    # An exception could be taken for an answer by whoever tries a model out.
    os.write(2, b"fisherkern: stopped by SIGTERM, as torchrun does where another process ended\n")
    os._exit(128 + number)


class Dealer:
    """Deals batches as they come, each to the process with the smallest total length so far.

    Whole batches, so that a process computes what one process would, to the bit.
    """

    def __init__(self) -> None:
        self._loads = [0] * world()

    def takes(self, length: int) -> bool:
        """Return whether this process takes the next batch, of so many positions."""
        taker = min(range(len(self._loads)), key=self._loads.__getitem__)
        self._loads[taker] += length
        return taker == rank()


def own_numbers(lengths: Sequence[int]) -> list[int]:
    """Return which of some batches this process takes, ascending; the longest are dealt first."""
    dealer = Dealer()
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    return sorted(number for number in order if dealer.takes(lengths[number]))


def own_part(number: int, lengths: Tensor) -> slice:
    """Return this process's sequences of a batch that all work on: neighbours, a fair share.

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


def own_share(lengths: Tensor) -> tuple[slice, float]:
    """Return `own_part` of a batch, and what the mean over its sequences counts for.

    The mean over the processes of (that number times their mean) is the mean over the batch. A
    process that is left without gets the first sequence, which counts for 0.
    """
    own = own_part(0, lengths)
    size = own.stop - own.start
    return (own, size * world() / len(lengths)) if size else (slice(0, 1), 0.0)


def joined_sum(values: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes, added in their order: the same bits in all.

    Each adds up its part of the entries and gives the sums to all: what a process sends does not
    grow with the number of processes.
    """
    if world() == 1:
        return values
    flat = values.detach().contiguous().view(-1)
    joined = torch.empty_like(flat)
    for own, to in zip(flat.split(_AT_ONCE), joined.split(_AT_ONCE), strict=True):
        to.copy_(_joined_part(own.to(_wire(own.device))))
    return joined.view(values.shape)


def _joined_part(values: Tensor) -> Tensor:
    share = -(-len(values) // world())
    given = F.pad(values, (0, share * world() - len(values)))
    every = torch.empty_like(given)
    with peers_alive():
        dist.all_to_all_single(every, given)
    first, *others = every.view(world(), share)
    for other in others:
        first += other
    parts = [torch.empty_like(first) for _ in range(world())]
    with peers_alive():
        dist.all_gather(parts, first)
    return torch.cat(parts)[: len(values)]


def _wire(device: torch.device) -> torch.device:
    """Where the group's backend takes a tensor from that is on `device`."""
    backend = dist.get_backend()
    if backend == "gloo":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else device


def average_gradients_(parameters: Sequence[Tensor], loss: Tensor) -> float:
    """Set every gradient to its mean over the processes; returns the mean of the loss, 0-dim."""
    if world() == 1:
        return float(loss.detach())
    every = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    # The loss may lie on another device than what it is a function of.
    every.append(loss.detach()[None].to(every[0]) if every else loss.detach()[None])
    joined = joined_sum(torch.cat([own.flatten() for own in every])) / world()
    *means, value = joined.split([own.numel() for own in every])
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean.view(parameter.shape).to(parameter.dtype)
    return float(value)


@contextlib.contextmanager
def peers_alive() -> Iterator[None]:
    """Say in one line that another process is gone, of a block that only waits for the others."""
    try:
        yield
    except RuntimeError as error:
        raise _told(InputError(ENDED)) from error


def stacked(values: Tensor) -> Tensor:
    """Return the tensors of all processes, of one shape and dtype, in their order: (P, ...)."""
    if world() == 1:
        return values[None]
    given = values.detach().contiguous().to(_wire(values.device))
    every = [torch.empty_like(given) for _ in range(world())]
    with peers_alive():
        dist.all_gather(every, given)
    return torch.stack(every).to(values.device)


def gathered(value: Any) -> list[Any]:
    """Return every process's value, in their order."""
    return _told_by_all(None, value)


def _told_by_all(message: str | None, value: Any) -> list[Any]:
    """Every process's value; where one has a message instead, all raise it.

    All that is told goes through here, so that what fails in one process reaches the others
    wherever they wait.
    """
    if world() == 1:
        return [value]
    told: list[Any] = [None] * world()
    with peers_alive():
        dist.all_gather_object(told, (message, value))
    for number, (said, _) in enumerate(told):
        if said is not None:
            raise _told(InputError(said if number == rank() else f"process {number}: {said}"))
    return [own for _, own in told]


def _told(error: Exception) -> Exception:
    """Return the error, marked as one of which all processes know."""
    error.told = True  # type: ignore[attr-defined]
    return error


def check_same(given: Mapping[str, Any]) -> None:
    """Raise InputError, in every process, unless all were given the same, and run the same code.

    Values are compared by a hash of what `repr` says of them, bytes by their own.
    """
    if world() == 1:
        return
    same: dict[str, Any] = {"the code of fisherkern": source_sha256()}
    same |= {"torch": str(torch.__version__), "the call": sorted(given), **given}
    own = {name: _hash(value) for name, value in same.items()}
    for number, other in enumerate(gathered(own)):
        for name, value in own.items():
            if other.get(name) != value:
                text = f"{name}: process {number} has another than process {rank()}"
                raise _told(InputError(f"{text}; every process takes the same"))


def _hash(value: Any) -> bytes:
    given = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.sha256(given).digest()


def agreed(name: str, value: float) -> float:
    """Return process 0's value of what all have computed, so that all decide alike.

    Raises:
        InputError: The values differ by more than rounding.
    """
    values = gathered(value)
    for number, other in enumerate(values):
        none = math.isnan(other) and math.isnan(values[0])
        if not (none or math.isclose(other, values[0], rel_tol=_ROUNDING)):
            raise _told(
                InputError(
                    f"{name}: process {number} found {other:g} and process 0 {values[0]:g}; every "
                    "process takes the same"
                )
            )
    return float(values[0])


@contextlib.contextmanager
def together(shared: bool = True) -> Iterator[dict[str, Any]]:
    """End the block in all processes where it fails in one, with that one's message.

    What the block puts into the dict that it is given must be the same in all (`check_same`). What
    waits for the other processes inside must itself end like this before. Not `shared`, a block is
    this process's own business.
    """
    same: dict[str, Any] = {}
    if not shared:
        yield same
        return
    try:
        yield same
    except Exception as error:
        if world() > 1 and not getattr(error, "told", False):
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            with contextlib.suppress(InputError):
                _told_by_all(f"{kind}{error}", None)
            _told(error)
        raise
    check_same(same)
