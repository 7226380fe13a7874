"""Sums into rows chosen by an index, in an order that does not change from run to run."""

from __future__ import annotations

from torch import Tensor

from fisherkern.ops.device import on_gpu


def add_rows_(target: Tensor, index: Tensor, values: Tensor) -> None:
    """target[index_u] += values_u for every u, repeated indices included.

    target (V, ...), index (U,) int64, values (U, ...) of target's dtype. A CPU adds in the
    order of u. A GPU's `index_add_` is made of atomics, in the order in which they arrive;
    accumulating `index_put_` sorts first.
    """
    if on_gpu(target):
        target.index_put_((index,), values, accumulate=True)
    else:
        target.index_add_(0, index, values)
