"""One tensor of all members, merged a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherkern.merging.rules.base import MergeBlock

# Entries of a tensor merged at once. The float64 copies of the members' values, Fishers and
# shares stay in the processor's cache: four times as fast as blocks of 4 million.
BLOCK = 1 << 16

_RowIndex = Tensor | slice


@dataclass(frozen=True)
class BlockIterator:
    """One tensor of every member and all that a merge method may know of it, except lambda.

    tensors: M of them. rows: per member, the row that each merged row comes from, -1 for none
    (`CatalogueUnion.rows`); None where nothing moves. fishers: each member's Fisher and the unit to
    divide it by. base, base_rows: the same for the base. grams, heads: see `rules.TensorBlocks`.
    """

    name: str
    tensors: Sequence[Tensor]
    rows: Sequence[Tensor] | None = None
    fishers: Sequence[tuple[Tensor, float]] | None = None
    base: Tensor | None = None
    base_rows: Tensor | None = None
    grams: list[Tensor] | None = None
    heads: tuple[str, int, int] | None = None
    floor: float = 0.0
    seed: int = 0

    @property
    def members(self) -> int:
        """M."""
        return len(self.tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the merged tensor."""
        first = self.tensors[0]
        if self.rows is None:
            return tuple(first.shape)
        return len(self.rows[0]), *first.shape[1:]

    def __iter__(self) -> Iterator[MergeBlock]:
        """Yield the blocks with equal weights, as `MergeMethod.prepare` sees them."""
        for _, block in self.weighted([1 / self.members] * self.members, None):
            yield block

    def weighted(self, weights: Sequence[float], stats: Any) -> Iterator[tuple[slice, MergeBlock]]:
        """Yield (rows of the merged table, block); nothing for an empty tensor."""
        device = self.tensors[0].device
        length = self.shape[0] if self.shape else 1
        columns = as_table(self.tensors[0]).shape[1]
        if length == 0 or columns == 0:
            return
        lam = torch.tensor(weights, dtype=torch.float64)
        step = max(1, BLOCK // columns)
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            size = rows.stop - start
            part: list[_RowIndex] = [rows] * self.members
            if self.rows is not None:
                part = [row[rows] for row in self.rows]
            owns = torch.stack([_present(index, size) for index in part])
            base, base_owns = None, torch.zeros(size, dtype=torch.bool)
            if self.base is not None:
                where: _RowIndex = rows if self.base_rows is None else self.base_rows[rows]
                base, base_owns = _rows_of(self.base, where, device), _present(where, size)
            yield (
                rows,
                MergeBlock(
                    theta=_gather(self.tensors, part, device),
                    weights=_owner_weights(lam, owns)[:, :, None].to(device),
                    fisher=self._fisher(part, device),
                    floor=self.floor,
                    lam=lam.to(device),
                    owns=owns[:, :, None].to(device),
                    base=base,
                    base_owns=base_owns[:, None].to(device),
                    name=self.name,
                    start=start,
                    stats=stats,
                    seed=self.seed,
                ),
            )

    def _fisher(self, part: Sequence[_RowIndex], device: torch.device) -> Tensor | None:
        if self.fishers is None:
            return None
        units = [unit for _, unit in self.fishers]
        unit = torch.tensor(units, dtype=torch.float64, device=device)[:, None, None]
        return _gather([value for value, _ in self.fishers], part, device) / unit


def merge_tensor(
    function: Callable[[MergeBlock], Tensor],
    blocks: BlockIterator,
    weights: Sequence[float],
    stats: Any = None,
) -> Tensor:
    """Apply `function`, a merge method with its options set, block by block; dtype of member 0's.

    weights: lambda, M numbers. stats: what the method's `prepare` found for this tensor.
    """
    first = blocks.tensors[0]
    merged = torch.empty(blocks.shape, dtype=first.dtype, device=first.device)
    for rows, block in blocks.weighted(weights, stats):
        as_table(merged)[rows] = function(block).to(first.dtype)
    return merged


def as_table(tensor: Tensor) -> Tensor:
    """`tensor` as (rows, columns); a number is one row of one."""
    if tensor.dim() == 0:
        return tensor.reshape(1, 1)
    return tensor.reshape(len(tensor), -1) if tensor.numel() else tensor.reshape(len(tensor), 0)


def _present(index: _RowIndex, length: int) -> Tensor:
    """(length,) bool: whether there is such a row."""
    if isinstance(index, slice):
        return torch.ones(length, dtype=torch.bool)
    return index >= 0


def _rows_of(tensor: Tensor, index: _RowIndex, device: torch.device) -> Tensor:
    """(n, c) float64 of a tensor's rows, zeros where a row is -1."""
    table = as_table(tensor)
    if isinstance(index, slice):
        return table[index].to(device, torch.float64)
    index = index.to(table.device)
    block = table[index.clamp(min=0)].to(device, torch.float64)
    block[(index < 0).to(device)] = 0
    return block


def _gather(tensors: Sequence[Tensor], rows: Sequence[_RowIndex], device: torch.device) -> Tensor:
    """(M, n, c) float64 of the members' rows, zeros where a row is -1."""
    found = [_rows_of(tensor, index, device) for tensor, index in zip(tensors, rows, strict=True)]
    return torch.stack(found)


def _owner_weights(lam: Tensor, owns: Tensor) -> Tensor:
    """(M, n) float64 lambda, 0 where a member lacks the row.

    A row all of whose owners have lambda 0 is shared by them equally: it keeps their value.
    """
    weights = torch.where(owns, lam[:, None], 0.0)
    return torch.where(weights.sum(0) > 0, weights, owns.double())


def agree(tensors: Sequence[Tensor], rows: Sequence[Tensor] | None) -> tuple[Tensor | None, int]:
    """Return (the members' common tensor, 0), or (None, m) for the first member m that differs."""
    first = tensors[0].detach()
    if rows is None:
        for member, tensor in enumerate(tensors):
            if not _equal(tensor.detach().to(first.device), first):
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


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.layout != other.layout or one.shape != other.shape:
        return False
    if one.layout != torch.strided:
        one, other = one.to_sparse().coalesce(), other.to_sparse().coalesce()
        return torch.equal(one.indices(), other.indices()) and _equal(one.values(), other.values())
    if one.element_size() == 1:  # float8 has no comparison
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one, other)
