"""What every encoder of ours offers to training, evaluation, Fisher and merging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern.errors import InputError

Batch = Tensor | Mapping[str, Any]


class SequenceEncoder(nn.Module):
    """A next-item recommender p(y | s) = softmax(W h(s) + b).

    Item ids run from 1 to V = `num_items`; 0 is padding. A batch is the histories,
    (N, T) of an integer dtype, oldest item first, padded with 0 on the left, or a
    mapping that holds them under "history".

    Subclasses set `config` (the keyword arguments that rebuild them) and `transform`
    (the map from a state to h), and define `states`, `encode` and `head`.
    """

    first_item = 1  # the item id that column 0 of the logits stands for
    config: dict[str, Any]
    transform: nn.Module

    def __init__(self, num_items: int, max_len: int, dim: int) -> None:
        super().__init__()
        for name, value in (("num_items", num_items), ("max_len", max_len), ("dim", dim)):
            if value < 1:
                raise InputError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        self.num_items = num_items
        self.max_len = max_len
        self.dim = dim
        self.item_ids: list[str] | None = None  # external ids; item_ids[v - 1] is item v's
        self.merge_report: dict[str, Any] | None = None  # how `merge` made it, where it did

    def states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states before `transform`, (N, T, D), or (N, Q, D) at `positions` (N, Q) int64."""
        raise NotImplementedError

    def encode(self, batch: Batch) -> Tensor:
        """h (N, D) at the prediction position."""
        raise NotImplementedError

    def head(self) -> tuple[Tensor, Tensor | None]:
        """W (V, D) and b (V,) or None; views of the parameters, so that ties share storage."""
        raise NotImplementedError

    def item_parameters(self) -> dict[str, int]:
        """Names of the parameters with one row per item, and the row of item 1 in each."""
        raise NotImplementedError

    def mask_items(self, tokens: Tensor, positions: Tensor, chosen: Tensor) -> Tensor:
        """`tokens` (N, T) with those at `positions` (N, Q) hidden where `chosen` (N, Q) is true."""
        raise InputError(f"{type(self).__name__} has no mask token, which masked items need")

    def forward(self, batch: Batch) -> Tensor:
        """Next-item logits W h + b, (N, V); column c is item c + 1."""
        weight, bias = self.head()
        return F.linear(self.encode(batch), weight, bias)

    def read_history(self, batch: Batch) -> Tensor:
        """The last `max_len` columns of a batch's histories, int64, on the model's device.

        Raises InputError when they are missing, not an integer (N, T) tensor with T >= 1,
        hold an id outside 0..V, or are padded on the right.
        """
        if isinstance(batch, Mapping):
            if "history" not in batch:
                raise InputError(f"the batch has no 'history', only {sorted(batch)}")
            history = batch["history"]
        else:
            history = batch
        if not isinstance(history, Tensor):
            raise InputError(f"history must be a tensor, got {type(history).__name__}")
        if history.is_floating_point() or history.is_complex() or history.dtype == torch.bool:
            raise InputError(f"history must hold integer item ids, got {history.dtype}")
        if history.ndim != 2 or history.shape[1] == 0:
            raise InputError(f"history must be (N, T) with T >= 1, got {tuple(history.shape)}")
        history = history[:, -self.max_len :].to(next(self.parameters()).device, torch.int64)
        if history.shape[0]:
            low, high = (int(bound) for bound in torch.aminmax(history))
            if low < 0 or high > self.num_items:
                wrong = low if low < 0 else high
                raise InputError(f"history holds item id {wrong}, outside 0..{self.num_items}")
            wrong_side = (history[:, -1] == 0) & (history != 0).any(dim=1)
            if bool(wrong_side.any()):
                row = int(wrong_side.nonzero()[0, 0])
                raise InputError(f"history row {row} ends in padding; pad with 0 on the left")
        return history
