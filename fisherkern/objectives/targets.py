"""Next items of a batch, and the cross-entropy of logits at them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.errors import InputError


def input_and_target(batch: Any, model: Any, argument: str) -> tuple[Any, Tensor]:
    """Split a batch into the model's input and its next items.

    Args:
        batch: A mapping with "target", which is the input too, or an (input, target) pair.
        model: Its `first_item` (default 0) is the item id of logit column 0.
        argument: Name of the argument that the batch came by, for the error message.

    Returns:
        The input, and (N,) int64 columns of the next items among the logits.

    Raises:
        InputError: The batch holds no next items.
    """
    if isinstance(batch, Mapping) and "target" in batch:
        inputs, target = batch, batch["target"]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, target = batch
    else:
        raise InputError(
            f"{argument}: a batch holds no next items; give mappings with 'history' and 'target', "
            "or (history, target) pairs"
        )
    return inputs, torch.as_tensor(target).long() - int(getattr(model, "first_item", 0))


def check_columns(logits: Tensor, column: Tensor, argument: str) -> Tensor:
    """Return `logits` (N, V); raise InputError unless `column` (N,) lies among its columns."""
    if len(column) and (int(column.min()) < 0 or int(column.max()) >= logits.shape[1]):
        raise InputError(f"{argument}: a batch's next items are outside the catalogue")
    return logits


def next_item_cross_entropy(model: Any, batch: Any, argument: str) -> Tensor:
    """Return the mean over sequences of -log softmax(model(input))[next item], 0-dim.

    Raises:
        InputError: The batch holds no next items, or some outside the catalogue.
    """
    inputs, column = input_and_target(batch, model, argument)
    logits = model(inputs)
    column = column.to(logits.device)
    return F.cross_entropy(check_columns(logits, column, argument), column)
