"""Which names of a model stand for the same memory, and how to keep it so in a new model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisherkern.errors import InputError


@dataclass(frozen=True)
class Tie:
    """One piece of memory: the name of the tensor that spans it, and the other names in it."""

    name: str
    aliases: tuple[str, ...] = ()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every name of every parameter, then of every buffer, duplicates included."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """First byte and end of `tensor` in memory; both 0, PyTorch's address of it, if it is empty."""
    if tensor.layout != torch.strided:
        return None
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    steps = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return start, start + (1 + steps) * tensor.element_size()


def find_ties(model: nn.Module, owner: str) -> list[Tie]:
    """Return the tensors as ties, in order of registration; an untied tensor is a tie alone.

    Tied means overlapping memory, not the same storage: a GRU's weights on a GPU are disjoint
    slices of one storage and are not tied. Raises InputError, naming `owner`, for tensors that
    overlap without one holding the others, and for a parameter inside a buffer.
    """
    tensors = named_tensors(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    spans = {name: _span(tensor) for name, tensor in tensors.items()}
    order = {name: position for position, name in enumerate(tensors)}
    # Sparse tensors have no memory of their own.
    groups = [[name] for name, span in spans.items() if span is None]
    device, end = None, 0
    # The longest first among those that start together; the first registered among equals.
    dense = {name: span for name, span in spans.items() if span is not None}
    for name in sorted(dense, key=lambda n: (str(tensors[n].device), dense[n][0], -dense[n][1])):
        start, stop = dense[name]
        if tensors[name].device == device and start < min(end, stop):
            if stop > end:
                raise InputError(
                    f"{owner}: tensors {groups[-1][0]!r} and {name!r} overlap in memory and "
                    "neither holds the other, so they cannot be merged"
                )
            groups[-1].append(name)
        else:
            groups.append([name])
            device, end = tensors[name].device, stop
    for group in groups:
        held = parameters.intersection(group)
        if held and group[0] not in parameters:
            raise InputError(
                f"{owner}: parameter {min(held)!r} lies in the memory of buffer {group[0]!r}, "
                "so it cannot be merged"
            )
    groups.sort(key=lambda group: order[group[0]])
    return [Tie(group[0], tuple(group[1:])) for group in groups]


def write_tied(
    target: nn.Module, layout: nn.Module, ties: Sequence[Tie], values: Mapping[str, Tensor]
) -> None:
    """Give the tensors of `target` new `values` (by tie name), tied as those of `layout`.

    `deepcopy` gives every Parameter its own memory, so the copy of a model tied by storage is
    not tied: each alias becomes a view again, at its place in the memory of `layout`'s tie.
    """
    new, old = named_tensors(target), named_tensors(layout)
    for tie in ties:
        model, value = old[tie.name], values[tie.name]
        if model.layout != torch.strided:
            continue  # the members agree, and `target` is a copy of one
        # Read before anything is written: `layout` may be `target`.
        start = model.storage_offset()
        places = {
            alias: (old[alias].size(), old[alias].stride(), old[alias].storage_offset() - start)
            for alias in tie.aliases
        }
        home = torch.empty_strided(
            model.size(), model.stride(), dtype=value.dtype, device=value.device
        )
        if any(
            step == 0 and size > 1 for size, step in zip(model.size(), model.stride(), strict=True)
        ):
            home = torch.empty_like(value)  # an expanded tensor has no memory for its values
        new[tie.name].data = home.copy_(value)
        for alias, (size, stride, offset) in places.items():
            new[alias].data = home.as_strided(size, stride, offset)
