"""What a batch is: its size, its parts, what a model is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fisherkern.errors import InputError


def model_input(batch: Any) -> Any:
    """What the model is called with: the history of a (history, target) pair, else the batch."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch


def batch_size(batch: Any) -> int:
    """N of a batch: a tensor, a mapping of tensors, a pair, or anything with a length."""
    if isinstance(batch, Mapping):
        sizes = {len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim() > 0}
        if len(sizes) != 1:
            raise InputError(f"batch: its tensors must share one leading size, got {sorted(sizes)}")
        return sizes.pop()
    if isinstance(batch, (tuple, list)):
        return len(batch[0])
    return len(batch)


def batch_slice(batch: Any, start: int, stop: int) -> Any:
    """Sequences start..stop-1 of a batch, of the same kind."""
    return batch_take(batch, slice(start, stop))


def batch_take(batch: Any, index: slice | Tensor) -> Any:
    """Some sequences of a batch, of the same kind; indices (n,) int64 only from tensors."""
    if isinstance(batch, Mapping):
        return {
            key: v[index] if isinstance(v, Tensor) and v.dim() > 0 else v
            for key, v in batch.items()
        }
    if isinstance(batch, (tuple, list)):
        return type(batch)(part[index] for part in batch)
    return batch[index]
