"""Telling what a forward pass computes from its batch from what needs parameters alone."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Nesting of a batch, and of the lists that functions are given, that is looked into.
_DEPTH = 4

# What makes a number of rows of values, so that rows may be as many as sequences by chance; among
# them what gives the lengths of sequences to Python.
_COUNTED = {
    torch.masked_select,
    torch.Tensor.masked_select,
    torch.nonzero,
    torch.Tensor.nonzero,
    torch.argwhere,
    torch.Tensor.argwhere,
    torch.unique,
    torch.Tensor.unique,
    torch.unique_consecutive,
    torch.Tensor.unique_consecutive,
    torch.repeat_interleave,
    torch.Tensor.repeat_interleave,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
}

# What puts rows in an order, of a vector.
_ORDERED = {
    torch.sort,
    torch.Tensor.sort,
    torch.argsort,
    torch.Tensor.argsort,
    torch.topk,
    torch.Tensor.topk,
}

# What makes tensors of numbers from elsewhere, which may be the batch's.
_FROM_OUTSIDE = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}


def tensors_in(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """Yield the tensors that a batch or an argument holds, whatever it is made of."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or isinstance(value, (str, bytes, int, float, type(None))):
        return
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part, depth - 1)
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            yield from tensors_in(part, depth - 1)
    elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        yield from tensors_in(getattr(value, "__dict__", {}), depth - 1)


class BatchDependence:
    """Which tensors of a forward pass come from its batch of `num_sequences`.

    A tensor that nobody saw being made counts as the batch's if it has a row for each sequence.
    One that escapes notice all the same only costs time: the calls that use it as a parameter
    are squared by a longer way or take the fallback. Without a batch everything depends on it.
    """

    def __init__(self, batch: Any, num_sequences: int) -> None:
        self._everything = batch is None
        self._num_sequences = num_sequences
        # By id: the tensor, and whether it comes from the batch.
        self._known: dict[int, tuple[weakref.ref[Tensor], bool]] = {}
        self.note(tensors_in(batch), True)

    def __contains__(self, tensor: Tensor) -> bool:
        if self._everything:
            return True
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        return not tensor.requires_grad and tensor.shape[:1] == (self._num_sequences,)

    def note(self, tensors: Iterable[Tensor], depends: bool) -> None:
        """Remember of these whether they come from the batch."""
        for tensor in tensors:
            self._known[id(tensor)] = weakref.ref(tensor), depends

    def follow(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        """Note what a call made: the batch's, if any of its arguments is."""
        if self._everything or isinstance(output, (torch.Size, torch.dtype, torch.device, int)):
            return
        depends = function in _FROM_OUTSIDE or self.among(args, kwargs)
        if output is None and args and isinstance(args[0], Tensor):
            output = args[0] if depends else None  # written in place
        self.note(tensors_in(output, 2), depends)

    def among(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether an argument of a call depends on the batch."""
        return any(t in self for part in (args, kwargs.values()) for t in tensors_in([*part], 3))


def counts_rows(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call makes rows by values: those where a condition holds, or in another order."""
    if func in _COUNTED:
        return True
    if func in _ORDERED and args and isinstance(args[0], Tensor) and args[0].dim() == 1:
        return True
    if func is torch.where:
        return len(args) == 1
    if func is not torch.Tensor.__getitem__ or len(args) < 2:
        return False
    indices = args[1] if isinstance(args[1], tuple) else (args[1],)
    kinds = (torch.bool, torch.uint8)
    return any(isinstance(index, Tensor) and index.dtype in kinds for index in indices)
