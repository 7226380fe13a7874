"""A batch in the parts that the engine works on at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern.encoders import SequenceEncoder
from fisherkern.fisher.subject import Subject, batch_slice, batch_take, model_input

# Lengths are told apart in eighths of the batch's columns: a part then computes at most an
# eighth more positions than its sequences have.
_BUCKETS = 8
# Fewer sequences of one length class join the next longer: a part's calls cost as much as theirs.
_LEAST = 24
# Worth it where so much of the work is left, counting a part's calls as so many positions.
_WORTH, _CALLS = 0.85, 400


def chunks(subject: Subject, batch: Any, n: int, size: int) -> Iterator[tuple[Any, Tensor]]:
    """Parts of at most `size` of the batch's `n` sequences, and the numbers of those in it.

    Sequences of alike lengths stand together where the model computes no padding that a
    whole part shares, as ours do (design section 2: padding is skipped).
    """
    order = _by_length(subject, batch)
    for group in [torch.arange(n)] if order is None else order:
        for first in range(0, len(group), size):
            part = group[first : first + size]
            if order is None:
                whole = len(part) == n
                yield batch if whole else batch_slice(batch, first, first + len(part)), part
            else:
                yield batch_take(batch, part), part


def _by_length(subject: Subject, batch: Any) -> list[Tensor] | None:
    """The sequences' numbers, ascending in each group of alike lengths; None to leave the order."""
    history = model_input(batch)
    if isinstance(history, Mapping):
        history = history.get("history")
    if not isinstance(subject.module, SequenceEncoder) or not isinstance(history, Tensor):
        return None
    if isinstance(batch, (tuple, list)) and not all(isinstance(part, Tensor) for part in batch):
        return None
    if history.dim() != 2 or history.shape[1] < _BUCKETS or len(history) < 2 * _LEAST:
        return None
    width = history.shape[1]
    lengths = (history != 0).sum(dim=1).cpu()
    bucket = (lengths * _BUCKETS + width - 1) // width
    groups: list[Tensor] = []
    waiting = torch.empty(0, dtype=torch.int64)
    for number in range(_BUCKETS + 1):
        waiting = torch.cat([waiting, (bucket == number).nonzero()[:, 0]])
        if len(waiting) >= _LEAST:
            groups.append(waiting.sort().values)
            waiting = waiting[:0]
    if len(waiting):
        if groups:
            waiting = torch.cat([groups.pop(), waiting]).sort().values
        groups.append(waiting)
    cost = sum(len(group) * int(lengths[group].max()) + _CALLS for group in groups)
    return groups if cost < _WORTH * len(lengths) * int(lengths.max()) else None
