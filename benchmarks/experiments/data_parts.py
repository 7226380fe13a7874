"""Parts of a data set's training material, and models over parts of its catalogue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherkern.data import SequenceDataset
from fisherkern.encoders import SequenceEncoder

HELD_OUT = 2  # a user's last items: validation and test


def training_subset(
    data: SequenceDataset, keep: NDArray[np.bool_], item_ids: Sequence[str] | None = None
) -> SequenceDataset:
    """The training actions s_1..s_{n-2} of `data` that `keep` (num_actions,) bool takes.

    Users with fewer than two of them are left out. The two held-out positions that follow hold
    item 1, which neither windows nor training pairs read, so nothing that is held out in
    `data` gets in. `item_ids` is the catalogue of the part; every kept item must be in it.
    """
    lengths = np.diff(data.offsets)
    user = np.repeat(np.arange(data.num_users), lengths)
    keep = keep & (action_positions(data) < np.repeat(lengths - HELD_OUT, lengths))
    counts = np.bincount(user[keep], minlength=data.num_users)
    keep &= counts[user] >= 2
    users = np.flatnonzero(counts >= 2)
    ids = data.item_ids if item_ids is None else list(item_ids)
    number = {item: v for v, item in enumerate(ids, start=1)}
    table = np.array([0, *(number.get(item, 0) for item in data.item_ids)])
    offsets = np.concatenate([[0], np.cumsum(counts[users] + HELD_OUT)])
    items = np.ones(offsets[-1], np.int64)
    row = np.searchsorted(users, user[keep])
    items[np.arange(int(keep.sum())) + HELD_OUT * row] = table[data.items[keep]]
    return SequenceDataset(
        data.name, items, offsets, ids, [data.user_ids[u] for u in users.tolist()]
    )


def action_positions(data: SequenceDataset) -> NDArray[np.int64]:
    """(num_actions,) int64: every action's position in its user's sequence, from 0."""
    return np.arange(data.num_actions) - np.repeat(data.offsets[:-1], np.diff(data.offsets))


def with_catalogue(
    model: SequenceEncoder, item_ids: Sequence[str], filler: SequenceEncoder | None = None
) -> SequenceEncoder:
    """The model over another catalogue: its own rows, and those of `filler` for items it lacks.

    `filler` is of the same class and sizes; without one the model must have every item.
    """
    config = {**model.config, "num_items": len(item_ids)}
    result = type(model)(**config)
    first = model.item_parameters()
    # An item's source, (0, its row) in the model or (1, its row) in the filler.
    sources = [model] if filler is None else [model, filler]
    index = [{item: v for v, item in enumerate(m.item_ids or ())} for m in sources]
    row_sources = [
        next((s, rows[item]) for s, rows in enumerate(index) if item in rows) for item in item_ids
    ]
    states = [source.state_dict() for source in sources]
    values: dict[str, Tensor] = {}
    for name, tensor in states[0].items():
        if name in first:
            start = first[name]
            rows = [states[s][name][start + v] for s, v in row_sources]
            values[name] = torch.cat(
                [tensor[:start], torch.stack(rows), tensor[start + model.num_items :]]
            )
        else:
            values[name] = tensor
    result.load_state_dict(values)
    result.item_ids = list(item_ids)
    return result.eval()


def item_count_weights(
    model: SequenceEncoder, part: SequenceDataset, items: int
) -> dict[str, Tensor]:
    """The weight of each entry by counting actions; for `merge(fishers=...)`.

    An item's row gets the number of its training actions. Every other entry gets the mean over
    rows: the number of all actions divided by `items`, the size of the merged catalogue.
    """
    counts = torch.from_numpy(part.popularity()).to(torch.float32)
    first = model.item_parameters()
    weights = {}
    for name, parameter in model.named_parameters():
        value = torch.full_like(parameter, float(counts.sum()) / items, requires_grad=False)
        if name in first:
            rows = slice(first[name], first[name] + model.num_items)
            value[rows] = counts.reshape(-1, *[1] * (value.dim() - 1)).expand_as(value[rows])
        weights[name] = value
    return weights
