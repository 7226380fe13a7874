"""Multi-head attention by captured Linears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern import ops
from fisherkern.fisher.forward.capture import CapturedCall, Handlers, Rewrite
from fisherkern.fisher.forward.fast_ops import apply
from fisherkern.fisher.forward.slices import Slice, SliceRule
from fisherkern.ops.backend import on_gpu


def attention(
    call: CapturedCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """F.multi_head_attention_forward, (T, N, D) in and out, sequences first in between.

    PyTorch's own applies the output weight to a flattened (T·N, D), where sequences
    cannot be told apart. NotImplemented for what recommenders do not use (bias_k,
    static_k, add_zero_attn, unbatched or nested tensors), or may not (bad shapes).
    """
    weights = (in_proj_weight,) * 3
    if use_separate_proj_weight:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    unusual = (bias_k, bias_v, static_k, static_v)
    if (
        any(tensor is not None for tensor in unusual)
        or any(weight is None for weight in weights)
        or add_zero_attn
        or (training and dropout_p > 0)
        or any(tensor.dim() != 3 or tensor.is_nested for tensor in (query, key, value))
        or query.shape[2] != embed_dim_to_check
        or query.shape[2] % num_heads
        or (is_causal and attn_mask is None)
    ):
        return NotImplemented
    n = query.shape[1]
    projected = _projected(call, (query, key, value), weights, in_proj_bias)
    q, k, v = (p.unflatten(2, (num_heads, -1)).transpose(1, 2) for p in projected)
    if is_causal and key_padding_mask is None and not need_weights:
        masks = []
    else:
        masks, is_causal = _additive(attn_mask, key_padding_mask, n, query.dtype), False
    x, probabilities = _attended(call, q, k, v, masks, is_causal, need_weights)
    if probabilities is not None and average_attn_weights:
        probabilities = probabilities.mean(dim=1)
    output = call(F.linear, x.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    return output.transpose(0, 1), probabilities


def _projected(
    call: CapturedCall,
    inputs: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor | None, ...],
    bias: Tensor | None,
) -> list[Tensor]:
    """Return queries, keys, values (N, T, D); on a GPU by one product of equal inputs.

    On a CPU it costs more to put the three gradients side by side than one product saves.
    """
    query, key, value = inputs
    first = [tensor.transpose(0, 1) for tensor in inputs]
    if weights[0] is weights[1]:
        weight, width = weights[0], query.shape[2]
        assert weight is not None
        gpu = on_gpu(weight)
        if query is key and key is value and gpu:
            return list(call(F.linear, first[0], weight, bias).chunk(3, dim=2))
        together = key is value and gpu
        sizes = [width, 2 * width] if together else [width] * 3
        biases = [None] * 3 if bias is None else bias.split(sizes)
        parts = zip(first, weight.split(sizes), biases, strict=False)
        outputs = [call(F.linear, x, w, b) for x, w, b in parts]
        return [outputs[0], *outputs[1].chunk(2, dim=2)] if together else outputs
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return [call(F.linear, x, w, b) for x, w, b in zip(first, weights, biases, strict=True)]


def _attended(
    call: CapturedCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: list[Tensor],
    is_causal: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """(N, H, T, d) attended, and the weights (N, H, T, S) where they are needed."""
    if not (need_weights or any(mask.requires_grad for mask in masks)):
        mask = sum(masks[1:], masks[0]) if masks else None
        return _scaled_dot_product(q, k, v, mask, is_causal, None), None
    scores = q * math.sqrt(1.0 / q.shape[3]) @ k.transpose(2, 3)
    for mask in masks:
        scores = call(torch.add, scores, mask)
    probabilities = (torch.softmax if need_weights else _softmax)(scores, -1)
    return probabilities @ v, probabilities


def _softmax(scores: Tensor, dim: int) -> Tensor:
    """Give nothing to a query that may attend to nothing, as PyTorch's fused attention does."""
    result: Tensor = torch.ops.aten._safe_softmax(scores, dim)
    return result


def _additive(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, n: int, dtype: torch.dtype
) -> list[Tensor]:
    """Additive masks that broadcast to (N, H, T, S)."""
    parts = []
    if attn_mask is not None:
        shape = (n, -1) if attn_mask.dim() == 3 else (1, 1)
        parts.append(attn_mask.reshape(*shape, *attn_mask.shape[-2:]))
    if key_padding_mask is not None:
        parts.append(key_padding_mask[:, None, None])
    return [
        torch.zeros_like(part, dtype=dtype).masked_fill_(part, -math.inf)
        if part.dtype == torch.bool
        else part
        for part in parts
    ]


def scaled_dot_product(
    call: CapturedCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """F.scaled_dot_product_attention of (N, H, T, d), its backward pass by `ops`.

    A mask that learns is added by a captured call. NotImplemented where PyTorch would drop out,
    or repeat heads or sequences.
    """
    given = (query, key, value)
    unlike = any(t.dim() != 4 or t.is_nested or t.dtype != query.dtype for t in given)
    if (
        unlike
        or any(t.shape[:2] != query.shape[:2] for t in given)
        or dropout_p > 0
        or enable_gqa
        or (attn_mask is not None and is_causal)
    ):
        return NotImplemented
    if attn_mask is not None and attn_mask.requires_grad:
        scores = query * (query.shape[3] ** -0.5 if scale is None else scale) @ key.transpose(2, 3)
        return _softmax(call(torch.add, scores, attn_mask), -1) @ value
    return _scaled_dot_product(query, key, value, attn_mask, is_causal, scale)


def _scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    if is_causal:
        ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = ones.tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    by_position = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    attended: Tensor = apply(_Attended, *by_position, mask, scale)
    return attended.transpose(1, 2)


class _Attended(torch.autograd.Function):
    """softmax(scale q kᵀ + mask) v, its probabilities kept: q, k, v and result (N, T, H, d).

    The heads' numbers lie side by side, as the linear layers before and after have them, so that
    a probe copies nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        scores = q.transpose(1, 2) * scale @ k.permute(0, 2, 3, 1)
        if mask is not None:
            scores += mask
        p = _softmax(scores, -1)
        ctx.scale = scale
        ctx.save_for_backward(p, *(tensor.contiguous() for tensor in (q, k, v)))
        return (p @ v.transpose(1, 2)).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        p, q, k, v = ctx.saved_tensors
        gradients = ops.attention_backward(p, deltas[0][None], q, k, v, ctx.scale)
        return *(gradient[0] for gradient in gradients), None, None

    @staticmethod
    def slice_rule(ctx: Any, shape: torch.Size, given: Slice) -> SliceRule | None:
        """Of some queries, whose gradients go to all keys and values."""
        if given.dim != 1:
            return None
        p, q, k, v = ctx.saved_tensors
        p, q, keys = given.of(p, 2), given.of(q), Slice(1, 0, k.shape[1])

        def function(delta: Tensor) -> Sequence[Tensor]:
            return ops.attention_backward(p, delta, q, k, v, ctx.scale)

        return SliceRule(function, [given, keys, keys])


HANDLERS: Handlers = {
    F.multi_head_attention_forward: Rewrite(attention),
    F.scaled_dot_product_attention: Rewrite(scaled_dot_product),
}
