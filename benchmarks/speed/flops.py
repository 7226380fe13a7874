"""Counting the multiply-adds of matrix products, ours inside the ops of fisherkern included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


def _head(products: float) -> Callable[..., int]:
    """`products` matrix products of h (N, D) with W (V, D)."""
    return lambda h, weight, *_, **__: round(2 * products * h[0] * weight[0] * weight[1])


def _covariance(h: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    # The upper triangle of Σ_y p(y) w_y w_yᵀ beside the logits.
    return h[0] * weight[0] * weight[1] * (weight[1] + 3)


def _sketch(h: Shape, weight: Shape, *rest: Any, **__: Any) -> int:
    probes = rest[4]  # after bias, lse, mean, rows
    return 2 * (1 + probes) * h[0] * weight[0] * weight[1]


def _head_sqgrad(_fisher: Any, _bias_fisher: Any, h: Shape, weight: Shape, *_: Any, **__: Any):
    return _head(2)(h, weight)


def _segment(_fisher: Shape, delta: Shape, inputs: Shape, **__: Any) -> int:
    # Of the direct form, also where the Gram form does with fewer.
    return 2 * math.prod(delta) * inputs[2]


def _attention(p: Shape, delta: Shape, q: Shape, _k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    # dP, dQ, dK, dV of every probe: two products as wide as q, two as wide as v.
    return 4 * delta[0] * math.prod(p) * (q[3] + v[3])


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


# FLOP of one call, by op; a lookup and a normalisation have no matrix product.
FORMULAS: dict[str, Callable[..., int]] = {
    "attention_backward": _attention,
    "layer_norm_backward": lambda *_, **__: 0,
    "softmax_lse": _head(1),
    "softmax_topk": _head(1),
    "softmax_mean": _head(2),
    "softmax_covariance": _covariance,
    "softmax_sketch": _sketch,
    "sample_items": _head(1),
    "sample_distinct": _head(1),
    "head_sqgrad_": _head_sqgrad,
    "segment_outer_square_": _segment,
    "rows_product": _linear,
    "lookup_square_": lambda *_, **__: 0,
}


class _NoModules:
    """Stands for the counter's module tracker, whose hooks torch.func's transforms refuse."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def count(function: Callable[[], Any]) -> tuple[Any, int]:
    """The function's result, and 2 × the multiply-adds of the matrix products it does."""
    ours = {getattr(torch.ops.fisherkern, name): formula for name, formula in FORMULAS.items()}
    others = {torch.ops.mkldnn._linear_pointwise: _linear}
    counter = FlopCounterMode(display=False, custom_mapping={**ours, **others})
    counter.mod_tracker = _NoModules()
    with counter:
        result = function()
    return result, counter.get_total_flops()
