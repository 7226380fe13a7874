"""Output weights that are a table's rows, each scaled by a function of its own length.

A cosine head's weight is ŵ_v = e_v / |e_v|; with any ŵ_v = g(|e_v|) e_v the Jacobian of a row is
J_v = factor_v I + bend_v ŵ_v ŵ_vᵀ, which is symmetric and costs two numbers a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

# Roundings that a row's Jacobian may be off by.
_ROUNDINGS = 1e3


@dataclasses.dataclass(frozen=True)
class RowScaling:
    """How the rows of an output weight come from those of a table, as the table is now.

    table (V, D): part of a parameter. factor, bend (V,): ŵ_v = factor_v e_v, J_v as above.
    """

    table: Tensor
    factor: Tensor
    bend: Tensor

    def weight(self) -> Tensor:
        """Ŵ (V, D), with its gradient by the table."""
        rows = self.table.detach()
        scaled = self.factor[:, None] * rows
        # Zero, but for its gradient.
        along = (scaled * (self.table - rows)).sum(dim=1, keepdim=True)
        return self.factor[:, None] * self.table + self.bend[:, None] * scaled * along

    def pulled(self, weight: Tensor, items: Tensor, gradient: Tensor) -> Tensor:
        """J_v g: gradients (..., D) of rows `items` (...) of Ŵ as those of the table's rows."""
        rows = weight[items].to(gradient.dtype)
        along = (rows * gradient).sum(dim=-1, keepdim=True)
        factor, bend = (part.to(gradient.dtype)[items] for part in (self.factor, self.bend))
        return factor[..., None] * gradient + bend[..., None] * along * rows


def find_row_scaling(
    table: Tensor, weight: Tensor, pull: Callable[[Tensor], Tensor], span: slice
) -> tuple[RowScaling, Tensor] | None:
    """Find the scaling that makes a weight of a table's rows, and prove it on random directions.

    Args:
        table: (V, D) rows of a parameter.
        weight: (V, D) values computed from them.
        pull: Gradient of the weight, (V, D), -> gradient of the parameter.
        span: Where in the parameter the rows are.

    Returns:
        The scaling and the rows that get no gradient, (V,) bool; None for any other function.
    """
    rows, values = table.detach(), weight.detach()
    if values.dtype not in (torch.float32, torch.float64) or values.shape[1] < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows) for _ in range(2)
    )
    square, length = rows.square().sum(dim=1), values.square().sum(dim=1)
    there, scored = square > 0, length > 0
    gradient = pull(first)[span]
    fixed = (gradient == 0).all(dim=1)
    along = torch.where(there, (rows * first).sum(dim=1) / square, 0.0)
    across = first - along[:, None] * rows
    factor = (gradient * across).sum(dim=1) / across.square().sum(dim=1)
    by_value = torch.where(there, (rows * values).sum(dim=1) / square, 0.0)
    factor = torch.where(fixed, by_value, factor)
    stretch = torch.where(there, (pull(rows)[span] * rows).sum(dim=1) / square, factor)
    bend = torch.where(scored & ~fixed, (stretch - factor) / length, 0.0)
    scaling = RowScaling(table, factor, bend)
    claimed = scaling.pulled(values, torch.arange(len(rows), device=rows.device), second)
    claimed = claimed.masked_fill(fixed[:, None], 0.0)
    rounding = _ROUNDINGS * torch.finfo(values.dtype).eps
    size = (factor.abs() + bend.abs() * length) * second.norm(dim=1)
    proved = (claimed - pull(second)[span]).norm(dim=1) <= rounding * size
    equal = (factor[:, None] * rows - values).norm(dim=1) <= rounding * length.sqrt()
    return (scaling, fixed) if bool((proved & equal).all()) else None
