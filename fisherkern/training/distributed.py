"""Several processes, one run: what they agree on, and the mean of their gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fisherkern.errors import InputError
from fisherkern.objectives.batch_loss import BatchLoss
from fisherkern.processes import rank, world


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a tensor, the same bits in every process."""
    if world() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / world()


def from_first_process(value: float, device: torch.device) -> float:
    """Process 0's `value` in all of them."""
    if world() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(tensor, 0)
    return tensor.item()


def check_same_start(step: int, device: torch.device) -> None:
    """Raise InputError unless every process starts from the same step."""
    if step != from_first_process(step, device):
        raise InputError(
            f"state: process {rank()} starts from step {step}, process 0 from another; "
            "all processes must see the same file"
        )


def wrap_ddp(loss: BatchLoss) -> nn.Module:
    """`loss`, whose gradients are averaged over the processes while backward runs."""
    if world() == 1:
        return loss
    # A batch may leave parameters out: those of a part that has nothing to learn from it.
    return DistributedDataParallel(loss, find_unused_parameters=True)
