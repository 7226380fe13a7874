"""A batch in the parts that the engine works on at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


def pieces(
    subject: Subject, batch: Any, n: int, size: Callable[[int], int]
) -> Iterator[tuple[Any, Tensor]]:
    """Parts of at most `size(T)` of the batch's `n` sequences, T positions that they compute.

    From long to short sequences where the model computes no padding that a whole part shares;
    in their order, of the batch's width, for other models; whole where neither is known.
    """
    history = _history(batch)
    if history is None:
        yield batch, torch.arange(n)
        return
    if not isinstance(subject.module, SequenceEncoder):
        step = max(1, size(history.shape[1]))
        for first in range(0, n, step):
            last = min(first + step, n)
            yield batch_slice(batch, first, last), torch.arange(first, last)
        return
    # What an encoder adds to a history is one mask token at most.
    lengths, order = ((history != 0).sum(dim=1) + 1).cpu().sort(descending=True, stable=True)
    while len(order):
        step = max(1, size(int(lengths[0])))
        part, order, lengths = order[:step].sort().values, order[step:], lengths[step:]
        yield batch_take(batch, part), part


def _history(batch: Any) -> Tensor | None:
    """The ids (N, T) of a batch whose sequences can be taken out by number."""
    history = model_input(batch)
    if isinstance(history, Mapping):
        history = history.get("history")
    if not isinstance(history, Tensor) or history.dim() != 2:
        return None
    if isinstance(batch, (tuple, list)) and not all(isinstance(part, Tensor) for part in batch):
        return None
    return history


def _by_length(subject: Subject, batch: Any) -> list[Tensor] | None:
    """The sequences' numbers, ascending in each group of alike lengths; None to leave the order."""
    history = _history(batch)
    if history is None or not isinstance(subject.module, SequenceEncoder):
        return None
    if history.shape[1] < _BUCKETS or len(history) < 2 * _LEAST:
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
