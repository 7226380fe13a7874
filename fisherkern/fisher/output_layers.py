"""The output layer's own closed form, and what it gives to a table that the encoder looks up.

Its weight may be a table's rows scaled, as a cosine head's. With J_v = factor_v I + bend_v ŵ_v ŵ_vᵀ
the gradient of row v of the table is J_v (1[v=y] − p_v) h + S_v: what holds of a plain output
layer, with J_v h in the place of h.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkern import ops
from fisherkern.adapters.parameters import ParamView
from fisherkern.adapters.row_scaling import RowScaling
from fisherkern.fisher.factors.factor import CovarianceFactor
from fisherkern.fisher.factors.item_table import ItemTable
from fisherkern.fisher.factors.samplers import SoftmaxStats, add_output_
from fisherkern.fisher.forward_backward import CapturedForward
from fisherkern.fisher.plan import TiedEmbeddingGrad
from fisherkern.ops.products import add_rows_
from fisherkern.ops.softmax_lse import exp_minus_, logit_tiles


@dataclasses.dataclass(frozen=True)
class OutputLayer:
    """W (V, D), b (V,) or None, and which parameters they view; None where they view none.

    Rows of W that get no gradient are `fixed_rows`, (V,) bool. With `row_scaling`, W is made of
    the rows of `weight_param`.
    """

    weight: Tensor
    bias: Tensor | None
    weight_param: ParamView | None
    bias_param: ParamView | None
    fixed_rows: Tensor | None = None
    row_scaling: RowScaling | None = None

    def table(self) -> ItemTable:
        """W and b without their graph."""
        return ItemTable(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def add_square_(
        self,
        sums: Tensor | None,
        sums_bias: Tensor | None,
        stats: SoftmaxStats,
        factor: CovarianceFactor,
        rows: Any,
        weight: float,
    ) -> None:
        """Add the closed form of some rows of the batch, times a weight."""
        apart = weight != 1 or self.fixed_rows is not None
        own = [
            None if s is None else torch.zeros_like(s) if apart else s for s in (sums, sums_bias)
        ]
        if self.row_scaling is None:
            add_output_(own, stats, factor, rows)
        else:
            ids = None if factor.ids is None else factor.ids[rows]
            omega = None if factor.omega is None else factor.omega[rows]
            inputs = stats.h[rows], stats.table.weight, stats.table.bias, stats.lse[rows]
            add_scaled_output_(own[0], own[1], *inputs, ids, omega, self.row_scaling)
        if apart and sums is not None and own[0] is not None:
            if self.fixed_rows is not None:
                own[0].masked_fill_(self.fixed_rows[:, None], 0.0)
            sums += weight * own[0]
        if apart and sums_bias is not None and own[1] is not None:
            sums_bias += weight * own[1]

    def of_rows(self, factor: CovarianceFactor) -> CovarianceFactor:
        """Return a factor without the cross terms of rows that have no output part."""
        if self.fixed_rows is None:
            return factor
        fixed, cross = self.fixed_rows, factor.tied_cross_term

        def of_others(sequence: Tensor, items: Tensor) -> Tensor:
            return cross(sequence, items).masked_fill(fixed[items][..., None], 0.0)

        return dataclasses.replace(factor, tied_cross_term=of_others)

    def tied(self, grad: TiedEmbeddingGrad, weight: Tensor) -> TiedEmbeddingGrad:
        """Return lookups' gradient of `weight_param`, with J_v h by segment in the place of h."""
        if self.row_scaling is None or self.weight_param is None:
            return grad
        row, sequence = grad.segments.row, grad.segments.sequence
        param = self.weight_param
        items = row - (param.start - grad.grad.param.start) // param.shape[1]
        # Segments of no row of the output layer have β = 0.
        items = items.clamp(min=0, max=len(weight) - 1)
        hidden = self.row_scaling.pulled(weight, items, grad.hidden[sequence])
        by_segment = grad.segments._replace(sequence=torch.arange(len(row), device=row.device))
        return dataclasses.replace(grad, segments=by_segment, hidden=hidden)


def add_scaled_output_(
    table_fisher: Tensor | None,
    bias_fisher: Tensor | None,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ids: Tensor | None,
    omega: Tensor | None,
    scaling: RowScaling,
) -> None:
    """Add the squared gradients of the table's rows and the bias, summed over items and rows.

        table_fisher[v] += Σ_n q_nv (J_v h_n)²

    q as in `ops.head_sqgrad_`, whose arguments the others are. Three products an item tile.
    """
    if bias_fisher is not None:
        ops.head_sqgrad_(None, bias_fisher, h, weight, bias, lse, ids, omega)
    if table_fisher is None:
        return
    states = h.to(lse.dtype)
    squared = states.square()
    share = torch.ones_like(lse) if omega is None else omega.to(lse.dtype).sum(dim=1)
    for start, stop, z in logit_tiles(h, weight, bias, by_item=True):
        own = z.clone()  # ŵ_v · h, (items, N)
        if bias is not None:
            own -= bias[start:stop, None].to(own.dtype)
        if omega is None:
            p = exp_minus_(z, lse)
            q = p.addcmul_(p, p, value=-1)
        else:
            q = exp_minus_(z, lse, 2.0).mul_(share)
        rows = weight[start:stop].to(q.dtype)
        factor, bend = (
            part[start:stop, None].to(q.dtype) for part in (scaling.factor, scaling.bend)
        )
        total = factor.square() * (q @ squared)
        q *= own
        total += 2 * factor * bend * rows * (q @ states)
        total += (bend * rows).square() * (q * own).sum(dim=1, keepdim=True)
        table_fisher[start:stop] += total.to(table_fisher.dtype)
    if ids is None or omega is None:
        return
    rows = weight[ids].to(lse.dtype)
    z = torch.einsum("nd,nkd->nk", states, rows)
    if bias is not None:
        z += bias[ids].to(lse.dtype)
    coefficient = omega.to(lse.dtype) * (1 - 2 * (z - lse[:, None]).exp())
    given = states[:, None].expand(-1, ids.shape[1], -1)
    terms = coefficient[:, :, None] * scaling.pulled(weight, ids, given).square()
    add_rows_(table_fisher, ids.flatten(), terms.flatten(0, 1).to(table_fisher.dtype))


def why_not_factored(layer: OutputLayer, forwards: Sequence[CapturedForward]) -> str | None:
    """Why the output layer has no closed form here; None where it has."""
    weight, bias = layer.weight_param, layer.bias_param
    for tensor, param in ((layer.weight, weight), (layer.bias, bias)):
        if tensor is not None and param is None and tensor.requires_grad:
            return "the output weight is computed from parameters, not one of them"
    for plan in (forward.plan for forward in forwards):
        if bias is not None and bias.name in plan.reached:
            return f"the output bias '{bias.name}' is used inside the encoder as well"
        if weight is None:
            continue
        for grad in plan.grads_of(weight.name):
            if not grad.embedding_only or grad.param.shape[1] != weight.shape[1]:
                return f"the output weight '{weight.name}' is used by more than a lookup"
        if weight.name in plan.fallback:
            return f"the output weight '{weight.name}' has a use no rule describes"
    return None
