"""K items of every row drawn from its softmax, from the ranges' log-sum-exps.

`softmax_mean` gives the mass of every range of items as it streams over them. A draw
chooses a range by those, then looks at the items of that range alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.ops import counter_rng
from fisherkern.ops.backend import on_gpu, use_triton
from fisherkern.ops.library import register_op
from fisherkern.ops.products import product
from fisherkern.ops.softmax_lse import RANGE, chosen_range, exp_minus_, reference_logits

# Logits of ranges held at once: 8 MB in fp32, and twice that for each fp64 temporary.
_ELEMENTS = 2**21
# Times that many elements of the item vectors, where a GPU copies them: 512 MB in fp32.
_GATHERED = 2**6


def row_blocks(num_rows: int, elements_of_a_row: int) -> list[slice]:
    """Slices of the rows such that what is held for each stays within a few tens of MB."""
    step = max(1, _ELEMENTS // max(elements_of_a_row, 1))
    return [slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]


def range_logits(h: Tensor, weight: Tensor, bias: Tensor | None, parts: Tensor) -> Tensor:
    """Logits of the items RANGE·part + 0 … RANGE − 1, −inf past the last item.

    h (N, D), weight (V, D), bias (V,) or None, parts (N, m) int64 -> (N, m, RANGE).
    """
    dtype = torch.promote_types(h.dtype, torch.float32)
    inputs, v = h.to(dtype), weight.shape[0]
    if on_gpu(h):
        return _gathered_logits(inputs, weight, bias, parts)
    found = torch.full((parts.numel(), RANGE), -torch.inf, dtype=dtype, device=h.device)
    # One product for all rows that want a range: a copy of the vectors for each is slower.
    ordered, place = torch.sort(parts.flatten())
    distinct, counts = torch.unique_consecutive(ordered, return_counts=True)
    for part, own in zip(distinct.tolist(), place.split(counts.tolist()), strict=True):
        first, last = part * RANGE, min((part + 1) * RANGE, v)
        own_bias = None if bias is None else bias[first:last].to(dtype)
        z = product(inputs[own // parts.shape[1]], weight[first:last].to(dtype), own_bias)
        found[own, : last - first] = z
    return found.view(*parts.shape, RANGE)


def _gathered_logits(h: Tensor, weight: Tensor, bias: Tensor | None, parts: Tensor) -> Tensor:
    """`range_logits` with a copy of the vectors for every row and range; waits for no GPU."""
    offsets = torch.arange(RANGE, device=h.device)
    blocks = []
    for block in row_blocks(len(h), parts.shape[1] * RANGE * weight.shape[1] // _GATHERED):
        items = parts[block][:, :, None] * RANGE + offsets
        past, items = items >= len(weight), items.clamp(max=len(weight) - 1)
        rows = weight[items.flatten(1)].to(h.dtype)
        z = torch.bmm(rows, h[block][:, :, None])[:, :, 0].view(items.shape)
        if bias is not None:
            z += bias[items].to(h.dtype)
        blocks.append(z.masked_fill_(past, -torch.inf))
    return torch.cat(blocks) if blocks else h.new_empty(*parts.shape, RANGE)


@register_op(lambda h, k, **_: h.new_empty((len(h), k), dtype=torch.int64))
def sample_items(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ranges: Tensor,
    rows: Tensor,
    k: int,
    seed: int,
) -> Tensor:
    """Draw k items from every row's softmax, with replacement.

        P(y_nj = v) = exp(h_n · w_v + b_v − lse_n)

    By inversion of the cumulative distribution, first over the ranges of items, then inside one:
    256·k logits a row. The result depends on (seed, row), not on the batch or the tile, up to
    rounding of a cumulative sum next to a draw.

    Args:
        h: (N, D) hidden states.
        weight: (V, D) item vectors.
        bias: (V,), or None for none.
        lse: (N,) from `softmax_mean`.
        ranges: (N, ⌈V/256⌉) fp64 from `softmax_mean`.
        rows: (N,) int64, the sequences' ids, which key the random numbers.
        k: Draws per row.
        seed: Key of the random numbers.

    Returns:
        ids (N, k) int64.
    """
    if use_triton("sample_items", h, weight, bias, lse):
        from fisherkern.ops import sample_items_triton

        return sample_items_triton.sample_items(h, weight, bias, lse, ranges, rows, k, seed)
    u = counter_rng.uniform(seed, rows, torch.arange(k, device=h.device))
    return items_at(u, h, weight, bias, lse, ranges)


def items_at(
    u: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor, ranges: Tensor
) -> Tensor:
    """Return the items at which the running sums of exp(z − lse) pass u (N, k): (N, k) int64."""
    ids = torch.empty(u.shape, dtype=torch.int64, device=h.device)
    for block in row_blocks(h.shape[0], max(ranges.shape[1], u.shape[1] * RANGE)):
        total = (ranges[block] - lse[block, None].double()).exp_().cumsum(dim=1)
        part, below = chosen_range(total, u[block])
        z = range_logits(h[block], weight, bias, part)
        # fp64, because ten million fp32 terms would not add up to one.
        cdf = exp_minus_(z, lse[block, None, None]).double().cumsum_(dim=2)
        # Rounding can put u at the range's end: the draw is then its last possible item.
        inside = torch.nextafter(cdf[:, :, -1], torch.zeros_like(below))
        inside = torch.minimum(u[block] - below, inside)
        place = torch.searchsorted(cdf, inside[:, :, None], right=True)[:, :, 0]
        ids[block] = part * RANGE + place
    return ids.clamp_(max=weight.shape[0] - 1)


def sample_items_reference(
    h: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, k: int, seed: int
) -> Tensor:
    """Compute the fp64 twin of `sample_items`; holds all probabilities."""
    cdf = reference_logits(h, weight, bias).softmax(dim=1).cumsum(dim=1)
    u = counter_rng.uniform(seed, rows, torch.arange(k, device=h.device))
    return torch.searchsorted(cdf, u, right=True).clamp_(max=weight.shape[0] - 1)
