"""What a batch is, whoever made it: its size, its parts, its device, its padding."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.processes import Dealer, own_share, world

# One-dimensional tensors of these names belong to positions, whatever their length.
_BY_POSITION = ("position_ids", "positions", "cache_position", "pos_ids")
# What says which places are no padding, by name: (N, T), true or 1 at an item.
MASKS = ("attention_mask", "padding_mask", "pad_mask")
# How many places each sequence has, padded on the right.
LENGTHS = ("item_length", "lengths", "seq_len", "history_lengths", "past_lengths")

Index = slice | Tensor


def model_input(batch: Any) -> Any:
    """Return what a model of one argument is called with: the history of a (history, target) pair.

    Of a list with one tensor, as a `TensorDataset` gives, the tensor.
    """
    if not isinstance(batch, (tuple, list)):
        return batch
    alone = len(batch) == 1 and _is_array(batch[0])
    return batch[0] if alone or len(batch) == 2 else batch


def batch_size(batch: Any) -> int:
    """N of a batch: a tensor, a mapping, a pair, or a nesting of these.

    Tensors of leading size 1 are shared by all sequences, as are those of position ids.

    Raises:
        InputError: No tensor, or leading sizes that differ; both are named.
    """
    sizes: dict[int, str] = {}
    for name, value in leaves(batch):
        if _is_array(value) and value.ndim and not _by_position(name, value):
            sizes.setdefault(len(value), name)
        elif _is_jagged(value):
            sizes.setdefault(value.stride(), name)
    several = {size: name for size, name in sizes.items() if size != 1}
    if len(several) > 1:
        named = ", ".join(f"{name or 'a tensor'} has {size}" for size, name in several.items())
        raise InputError(f"batch: its tensors must share one leading size, but {named}")
    if sizes:
        return next(iter(several or sizes))
    if isinstance(batch, Mapping) or not hasattr(batch, "__len__"):
        raise InputError(f"batch: a {type(batch).__name__} without tensors has no sequences")
    return len(batch)


def batch_slice(batch: Any, start: int, stop: int) -> Any:
    """Sequences start..stop-1 of a batch, of the same kind."""
    return batch_take(batch, slice(start, stop))


def batch_take(batch: Any, index: Index) -> Any:
    """Return some sequences of a batch, of its kind, by a slice or indices (n,) int64."""
    n = batch_size(batch)

    def part(name: str, value: Any) -> Any:
        if _is_array(value):
            shared = not value.ndim or len(value) != n or _by_position(name, value)
            if shared:
                return value
            return value[index] if isinstance(index, slice) else value[_indices(index, value)]
        if _is_jagged(value):
            return _jagged_rows(value, index)
        if isinstance(value, list) and len(value) == n and not _holds_arrays(value):
            rows = range(n)[index] if isinstance(index, slice) else index.tolist()
            return [value[row] for row in rows]
        return value

    return mapped(batch, part)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on `device`."""

    def moved(name: str, value: Any) -> Any:
        moves = isinstance(value, Tensor) or _is_jagged(value)
        return value.to(device, non_blocking=True) if moves else value

    return mapped(batch, moved)


def mapped(batch: Any, function: Callable[[str, Any], Any], name: str = "") -> Any:
    """Return a batch of the same kind whose leaves are function(name, leaf)."""
    if isinstance(batch, Tensor):
        return function(name, batch)
    if (interaction := _interaction(batch)) is not None:
        return type(batch)({key: function(key, value) for key, value in interaction.items()})
    if isinstance(batch, Mapping):
        parts = {key: mapped(value, function, str(key)) for key, value in batch.items()}
        return parts if type(batch) is dict else _rebuilt(batch, parts)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        named = zip(batch._fields, batch, strict=True)
        return type(batch)(*(mapped(value, function, key) for key, value in named))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [field.name for field in dataclasses.fields(batch) if field.init]
        changed = {key: mapped(getattr(batch, key), function, key) for key in fields}
        return dataclasses.replace(batch, **changed)
    if isinstance(batch, tuple) or (isinstance(batch, list) and _holds_arrays(batch)):
        return type(batch)(mapped(value, function, name) for value in batch)
    return function(name, batch)


def leaves(batch: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in a batch that is no container of tensors."""
    found: list[tuple[str, Any]] = []

    def note(name: str, value: Any) -> Any:
        found.append((name, value))
        return value

    mapped(batch, note)
    yield from found


def field(batch: Any, names: tuple[str, ...]) -> tuple[str, Tensor] | None:
    """Return the first tensor of a batch that has one of the names, and its name."""
    named = dict(reversed(list(leaves(batch))))
    for name in names:
        value = named.get(name)
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, Tensor):
            return name, value
    return None


def histories(batch: Any) -> Tensor | None:
    """Return the item ids (N, T) of a batch: its first integer tensor of two dimensions."""
    n = batch_size(batch)
    for name, tensor in leaves(batch):
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or len(tensor) != n:
            continue
        kind = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
        if not kind and name not in MASKS and name not in _BY_POSITION:
            return tensor
    return None


def sequence_lengths(batch: Any) -> Tensor:
    """How many ids of each sequence are not 0, (N,) int64 on the CPU; 1 where there are no ids."""
    ids = histories(batch)
    if ids is None:
        for _, value in leaves(batch):
            if _is_jagged(value):
                return _jagged_lengths(value).sum(dim=0).clamp(min=1).cpu()
        return torch.ones(batch_size(batch), dtype=torch.int64)
    return (ids != 0).sum(dim=1).clamp(min=1).cpu()


def takes(dealer: Dealer, batch: Any) -> bool:
    """Whether this process takes the next batch that is dealt."""
    return world() == 1 or dealer.takes(int(sequence_lengths(batch).sum()))


def shared_part(batch: Any) -> tuple[Any, slice, float]:
    """Return the process's sequences of a shared batch, their places, `own_share`'s weight.

    A list or tuple of tensors alone will do for a batch.
    """
    if world() == 1:
        return batch, slice(None), 1.0
    part, weight = own_share(sequence_lengths(batch))
    return batch_slice(batch, part.start, part.stop), part, weight


def real_places(batch: Any, pad: int | None = None) -> Tensor | None:
    """Which places of a batch hold items, (N, T) bool: by its mask, its lengths, or its padding.

    Args:
        batch: Any batch.
        pad: The id that is padding where neither a mask nor lengths say so; None: no id is.
    """
    ids = histories(batch)
    if (mask := field(batch, MASKS)) is not None and mask[1].dim() == 2:
        return mask[1] != 0
    if ids is not None and (lengths := field(batch, LENGTHS)) is not None:
        places = torch.arange(ids.shape[1], device=ids.device)
        return places[None] < lengths[1].to(ids.device).reshape(-1, 1)
    if ids is not None and pad is not None:
        return ids != pad
    return None


def is_jagged(batch: Any) -> bool:
    """Whether a batch has ids of every length in one row, as TorchRec's collections take them."""
    return any(_is_jagged(value) for _, value in leaves(batch))


def _is_jagged(value: Any) -> bool:
    """Whether this is like a KeyedJaggedTensor: values by key and sequence, and their lengths."""
    return not isinstance(value, (Tensor, Mapping, type)) and all(
        callable(getattr(value, name, None))
        for name in ("keys", "values", "lengths", "stride", "weights_or_none", "to")
    )


def _jagged_lengths(value: Any) -> Tensor:
    """How many values each key has of each sequence, (F, N)."""
    keys, n, lengths = value.keys(), value.stride(), value.lengths()
    if len(lengths) != len(keys) * n:
        raise InputError(f"batch: of its {n} sequences, keys have {len(lengths)} lengths in all")
    found: Tensor = lengths.view(len(keys), n).long()
    return found


def _jagged_rows(value: Any, index: Index) -> Any:
    """Return the values of some sequences, in a jagged tensor of the same kind."""
    lengths = _jagged_lengths(value)
    ends = lengths.flatten().cumsum(0).view(lengths.shape)
    own = lengths[:, index].flatten()
    starts = (ends - lengths)[:, index].flatten() - (own.cumsum(0) - own)
    places = starts.repeat_interleave(own) + torch.arange(int(own.sum()), device=own.device)
    weights = value.weights_or_none()
    return type(value)(
        keys=value.keys(),
        values=value.values()[places],
        weights=None if weights is None else weights[places],
        lengths=own.to(value.lengths().dtype),
    )


def _interaction(batch: Any) -> Mapping[str, Any] | None:
    """Return the tensors of RecBole's Interaction, which is no Mapping."""
    inner = getattr(batch, "interaction", None)
    return inner if isinstance(inner, Mapping) else None


def _rebuilt(batch: Mapping[str, Any], parts: dict[str, Any]) -> Any:
    """Return a mapping of the batch's own class; a dict where the class takes none."""
    try:
        made: Any = type(batch)(parts)  # type: ignore[call-arg]
    except TypeError:
        return parts
    return made if isinstance(made, Mapping) and collections.Counter(made) else parts


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _holds_arrays(values: list[Any]) -> bool:
    return any(_is_array(value) or isinstance(value, (Mapping, tuple)) for value in values)


def _by_position(name: str, value: Any) -> bool:
    return value.ndim == 1 and name in _BY_POSITION


def _indices(index: Tensor, value: Any) -> Any:
    return index.to(value.device) if isinstance(value, Tensor) else index.cpu().numpy()
