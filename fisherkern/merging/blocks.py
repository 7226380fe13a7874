"""One tensor of all members: rows gathered, a rule applied, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fisherkern.merging.rules import Operands

# Entries of a tensor merged at once. The float64 copies of the members' values, Fishers and
# shares stay in the processor's cache: four times as fast as blocks of 4 million.
BLOCK = 1 << 16


def merge_tensor(
    function: Callable[[Operands], Tensor],
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    fishers: Sequence[tuple[Tensor, float]] | None,
    rows: Sequence[Tensor] | None,
    floor: float,
) -> Tensor:
    """`function` (a rule) applied to the members' `tensors`; the dtype of member 0's.

    weights: lambda, M numbers. fishers: each member's Fisher and the unit to divide it by.
    rows: per member, the row that each merged row comes from, -1 for none (`Catalogue.rows`).
    """
    first = tensors[0]
    if first.numel() == 0 and rows is None:
        return first.clone()
    length = len(rows[0]) if rows is not None else len(_table(first))
    shape = (length, *first.shape[1:]) if first.dim() else ()
    merged = torch.empty(shape, dtype=first.dtype, device=first.device)
    table = _table(merged)
    step = max(1, BLOCK // max(1, table.shape[1]))
    for start in range(0, length, step):
        stop = min(start + step, length)
        part: list[Tensor | slice] = [slice(start, stop)] * len(tensors)
        if rows is not None:
            part = [row[start:stop] for row in rows]
        fisher = None
        if fishers is not None:
            units = [unit for _, unit in fishers]
            unit = torch.tensor(units, dtype=torch.float64, device=first.device)[:, None, None]
            fisher = _gather([value for value, _ in fishers], part, first.device) / unit
        theta = _gather(tensors, part, first.device)
        lam = _owner_weights(weights, part, stop - start, first.device)
        table[start:stop] = function(Operands(theta, lam, fisher, floor)).to(first.dtype)
    return merged


def _table(tensor: Tensor) -> Tensor:
    """`tensor` as (rows, columns); a number is one row of one."""
    return tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.reshape(1, 1)


def _gather(
    tensors: Sequence[Tensor], rows: Sequence[Tensor | slice], device: torch.device
) -> Tensor:
    """(M, n, c) float64 of the members' rows, zeros where a row is -1."""
    found = []
    for tensor, index in zip(tensors, rows, strict=True):
        table = _table(tensor)
        if isinstance(index, slice):
            block = table[index].to(device, torch.float64)
        else:
            index = index.to(table.device)
            block = table[index.clamp(min=0)].to(device, torch.float64)
            block[(index < 0).to(device)] = 0
        found.append(block)
    return torch.stack(found)


def _owner_weights(
    weights: Sequence[float],
    rows: Sequence[Tensor | slice],
    length: int,
    device: torch.device,
) -> Tensor:
    """(M, n, 1) float64 lambda, 0 where a member lacks the row.

    A row all of whose owners have lambda 0 is shared by them equally: it keeps their value.
    """
    lam = torch.tensor(weights, dtype=torch.float64)[:, None].expand(-1, length)
    present = torch.stack(
        [
            torch.ones(length, dtype=torch.bool) if isinstance(index, slice) else index >= 0
            for index in rows
        ]
    )
    lam = torch.where(present, lam, 0.0)
    lam = torch.where(lam.sum(0) > 0, lam, present.double())
    return lam[:, :, None].to(device)


def agree(tensors: Sequence[Tensor], rows: Sequence[Tensor] | None) -> tuple[Tensor | None, int]:
    """(The members' common tensor, 0), or (None, m) for the first member m that differs."""
    first = tensors[0].detach()
    if rows is None:
        for member, tensor in enumerate(tensors):
            if not torch.equal(tensor.to(first.device), first):
                return None, member
        return first.clone(), 0
    merged = first.new_zeros((len(rows[0]), *first.shape[1:]))
    filled = torch.zeros(len(rows[0]), dtype=torch.bool, device=first.device)
    for member, (tensor, index) in enumerate(zip(tensors, rows, strict=True)):
        index = index.to(first.device)
        have = index >= 0
        values = tensor.detach().to(first.device)[index.clamp(min=0)]
        both = have & filled
        if not torch.equal(values[both], merged[both]):
            return None, member
        merged[have] = values[have]
        filled |= have
    return merged, 0
