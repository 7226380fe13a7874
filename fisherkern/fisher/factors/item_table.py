"""The output layer's W and b: everything that a softmax over all items needs of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fisherkern import ops
from fisherkern.ops.products import add_rows_
from fisherkern.ops.softmax_lse import logit_tiles


class ItemTile(NamedTuple):
    """Logits z (N, C) of the items `first` + 0 … C − 1, their vectors (C, D) and rows in sums."""

    first: int
    z: Tensor
    vectors: Tensor
    place: slice


class ItemTable:
    """W (V, D) and b (V,) or None, on one device.

    Sums over the items pass through `joined`, and single items are fetched before they are asked
    for: a table of which this process has some rows only does work in both.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    @property
    def num_items(self) -> int:
        """V."""
        return len(self.weight)

    def mean(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return lse (N,), w̄ (N, D) and the ranges' log-sum-exps, as `ops.softmax_mean`."""
        return ops.softmax_mean(h, self.weight, self.bias)

    def largest(self, ranges: Tensor) -> Tensor:
        """Return the largest log-sum-exp of a range, (N,)."""
        return ranges.amax(dim=1)

    def topk(self, h: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return p and ids (N, k) of the most likely items, lse and w̄; `ops.softmax_topk`."""
        return ops.softmax_topk(h, self.weight, self.bias, k)

    def covariance(self, h: Tensor, lse: Tensor, mean: Tensor) -> Tensor:
        """C (N, D, D); `ops.softmax_covariance`."""
        return ops.softmax_covariance(h, self.weight, self.bias, lse, mean)

    def sketch(
        self, h: Tensor, lse: Tensor, mean: Tensor, rows: Tensor, probes: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Return u (N, R, D) and sums (N, R); `ops.softmax_sketch`."""
        return ops.softmax_sketch(h, self.weight, self.bias, lse, mean, rows, probes, seed)

    def draw(
        self, h: Tensor, lse: Tensor, ranges: Tensor, rows: Tensor, k: int, seed: int
    ) -> Tensor:
        """Draws (N, k) with replacement; `ops.sample_items`."""
        return ops.sample_items(h, self.weight, self.bias, lse, ranges, rows, k, seed)

    def draw_distinct(
        self, h: Tensor, lse: Tensor, ranges: Tensor, rows: Tensor, k: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Different items (N, k) and their weights; `ops.sample_distinct`."""
        return ops.sample_distinct(h, self.weight, self.bias, lse, ranges, rows, k, seed)

    def add_square_(
        self,
        sums: Sequence[Tensor | None],
        h: Tensor,
        lse: Tensor,
        ids: Tensor | None,
        omega: Tensor | None,
    ) -> None:
        """Add the squared gradients of W and b to their sums; `ops.head_sqgrad_`."""
        ops.head_sqgrad_(sums[0], sums[1], h, self.weight, self.bias, lse, ids, omega)

    def most_likely(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most likely item of each row and its logit, (N,) each."""
        highest = torch.full((len(h),), -torch.inf, dtype=h.dtype, device=h.device)
        item = torch.zeros(len(h), dtype=torch.int64, device=h.device)
        for tile in self.tiles(h):
            value, index = tile.z.max(dim=1)
            item = torch.where(value > highest, index + tile.first, item)
            highest = torch.maximum(highest, value)
        return item, highest

    def tiles(self, h: Tensor) -> Iterator[ItemTile]:
        """Yield the logits of h (N, D), a tile of items after another; z may be overwritten."""
        for start, stop, z in logit_tiles(h, self.weight, self.bias):
            yield ItemTile(start, z, self.weight[start:stop], slice(start, stop))

    def columns(self, rows: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Return the items of rows of the table that is looked up, and which of them are none.

        `rows` (...) int64, -1 for none; `first`: the row of item 0. What is no item is called 0.
        """
        items = rows - first
        outside = (rows < 0) | (items < 0) | (items >= self.num_items)
        return items.masked_fill(outside, 0), outside

    def joined(self, sums: Tensor) -> Tensor:
        """Return sums over this table's tiles as sums over all items."""
        return sums

    def fetch(self, items: Tensor) -> None:
        """Have the rows of some items at hand."""

    def rows(self, items: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the vectors (..., D) and biases (...) of items (...) that were fetched."""
        return self.weight[items], None if self.bias is None else self.bias[items]

    def add_rows_(self, sums: Tensor, items: Tensor, values: Tensor) -> None:
        """sums[item] += value of items (U,), repeated ones included, and values (U, ...)."""
        add_rows_(sums, items, values.to(sums.dtype))
