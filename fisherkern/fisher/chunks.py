"""A batch in the parts that the engine works on at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern.encoders import SequenceEncoder
from fisherkern.fisher.subject import Subject, batch_slice, batch_take, model_input

# Positions that a part has at least before lengths are told apart: its calls cost as much.
_POSITIONS = 4096


def chunks(subject: Subject, batch: Any, n: int, most: int) -> Iterator[tuple[Any, Tensor]]:
    """`pieces` of at most `most` sequences, few enough that those of alike lengths share one."""

    def size(positions: int | None) -> int:
        return most if positions is None else min(most, max(1, _POSITIONS // positions))

    return pieces(subject, batch, n, size)


def pieces(
    subject: Subject, batch: Any, n: int, size: Callable[[int | None], int]
) -> Iterator[tuple[Any, Tensor]]:
    """Parts of the batch's `n` sequences, and the numbers of those in it, ascending.

    At most size(T) sequences have a part, T the positions that they compute, None where that
    is unknown. From long to short sequences where the model computes no padding that a whole
    part shares, as ours do (design section 2: padding is skipped); otherwise in their order.
    """
    history = _history(batch)
    if history is None or not isinstance(subject.module, SequenceEncoder):
        width = None if history is None else history.shape[1]
        for numbers in _alike(n, max(1, size(width)), width):
            first, last = int(numbers[0]), int(numbers[-1]) + 1
            yield batch if last - first == n else batch_slice(batch, first, last), numbers
        return
    # What an encoder adds to a history is one mask token at most.
    lengths, order = ((history != 0).sum(dim=1) + 1).cpu().sort(descending=True, stable=True)
    while len(order):
        step = max(1, size(int(lengths[0])))
        part, order, lengths = order[:step].sort().values, order[step:], lengths[step:]
        yield batch_take(batch, part), part


def _alike(n: int, most: int, width: int | None) -> tuple[Tensor, ...]:
    """0..n−1 in parts of about as many, at most `most`, and where possible none of `width`.

    As many sequences as positions could not be told from them.
    """
    if n == 0:
        return ()
    least = -(-n // most)
    for count in range(least, n + 1):
        parts = torch.arange(n).tensor_split(count)
        if all(len(part) != width for part in parts):
            return parts
    return torch.arange(n).tensor_split(least)


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
