"""Parameters found again from themselves or their views."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ParamView:
    """A parameter or a view of one: `shape` entries from flat index `start` of `name`."""

    name: str
    start: int
    shape: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """Return the same view of a flattened tensor of the parameter's size."""
        return flat[self.start : self.start + math.prod(self.shape)].view(self.shape)

    def reshaped(self, *shape: int) -> ParamView:
        """Return the same entries in another shape."""
        return ParamView(self.name, self.start, shape)


class Parameters:
    """The trainable parameters of a module, found again from themselves or their views.

    `named` holds those with entries, `empty` the others, of which nothing is computed. Those of
    more than `most` entries are left out, as if they were frozen. `stand_ins`: tensors that are
    used in the places of some, by name.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        most: float = math.inf,
        stand_ins: Mapping[str, Tensor] | None = None,
    ) -> None:
        named = module.named_parameters()
        trainable = {n: p for n, p in named if p.requires_grad and p.numel() <= most}
        self.named: dict[str, Tensor] = {name: p for name, p in trainable.items() if p.numel()}
        self.empty = {name: p for name, p in trainable.items() if not p.numel()}
        self.stand_in(stand_ins or {})

    def stand_in(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in the places of parameters of the same names."""
        self.named |= {name: tensors[name] for name in self.named if name in tensors}
        self._names = {id(parameter): name for name, parameter in self.named.items()}

    def view_of(self, tensor: Any) -> ParamView | None:
        """Return what a parameter, or a contiguous view of its dtype, covers; None for others."""
        return view_among(self._names, tensor)

    def view_or_transpose(self, tensor: Any) -> ParamView | None:
        """`view_of` a tensor, or, for a matrix that is no such view, of its transpose."""
        view = self.view_of(tensor)
        if view is None and isinstance(tensor, Tensor) and tensor.dim() == 2:
            view = self.view_of(tensor.t())
        return view


def view_among(names: Mapping[int, str], tensor: Any) -> ParamView | None:
    """Return what a tensor, or a contiguous view, covers of those named by their `id`."""
    if not isinstance(tensor, Tensor):
        return None
    base = tensor if tensor._base is None else tensor._base
    name = names.get(id(base))
    if name is None or not (base.is_contiguous() and tensor.is_contiguous()):
        return None
    if tensor.dtype != base.dtype:
        return None
    start = int(tensor.storage_offset()) - int(base.storage_offset())
    return ParamView(name, start, tuple(tensor.shape))
