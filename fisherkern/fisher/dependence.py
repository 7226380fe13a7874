"""Telling what a forward pass computes from its batch from what needs parameters alone."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Nesting of a batch, and of the lists that functions are given, that is looked into.
_DEPTH = 4

# What makes tensors of numbers from elsewhere, which may be the batch's.
_FROM_OUTSIDE = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}


def tensors_in(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """The tensors that a batch or an argument holds, whatever it is made of."""
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
    """Which tensors of a forward pass come from its batch.

    A tensor that escapes notice (through `.tolist()`, say) only costs time: the calls that use
    it as a parameter are squared by a longer way or take the fallback. A batch without tensors
    makes everything depend on it.
    """

    def __init__(self, batch: Any) -> None:
        self._marked: dict[int, weakref.ref[Tensor]] = {}
        self.mark(tensors_in(batch))
        self._everything = not self._marked

    def __contains__(self, tensor: Tensor) -> bool:
        if self._everything:
            return True
        mark = self._marked.get(id(tensor))
        return mark is not None and mark() is tensor

    def mark(self, tensors: Iterator[Tensor]) -> None:
        """Count these among the batch's."""
        for tensor in tensors:
            self._marked[id(tensor)] = weakref.ref(tensor)

    def follow(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        """Mark what a call made, if any of its arguments depends on the batch."""
        if self._everything or isinstance(output, (torch.Size, torch.dtype, torch.device, int)):
            return
        if function in _FROM_OUTSIDE or self.among(args, kwargs):
            self.mark(tensors_in(output, 2))
            if output is None and args and isinstance(args[0], Tensor):
                self.mark(iter(args[:1]))  # written in place

    def among(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether an argument of a call depends on the batch."""
        return any(t in self for part in (args, kwargs.values()) for t in tensors_in([*part], 3))
