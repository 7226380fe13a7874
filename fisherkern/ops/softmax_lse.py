"""Tiles of the logits z = h Wᵀ + b, and their log-sum-exp.

Every op of the output layer streams over these tiles, so that no N×V matrix is
ever held beyond one of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherkern.ops.backend import on_gpu, use_triton
from fisherkern.ops.library import register_op
from fisherkern.ops.products import product, suits

# Elements of one (N, tile) block of logits. On a CPU 2 MB in fp32, which stays in a core's
# cache from the product that makes it to the one that uses it; a GPU wants few launches.
TILE_ELEMENTS = 2**19
_GPU_TILE_ELEMENTS = 2**24
_MOST_ITEMS = 2**14

# Items of a range, of which samplers know the log-sum-exp; tiles are whole ranges.
RANGE = 256

_LOG2_E = 1.4426950408889634


def tile_rows(h: Tensor) -> int:
    """Items a tile holds for the sequences of h (N, D): whole ranges."""
    elements = _GPU_TILE_ELEMENTS if on_gpu(h) else TILE_ELEMENTS
    ranges = min(elements // max(len(h), 1), _MOST_ITEMS) // RANGE
    return max(ranges, 1) * RANGE


def logit_tiles(
    h: Tensor, weight: Tensor, bias: Tensor | None, *, by_item: bool = False
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, z) with z = h W[start:stop]ᵀ + b[start:stop], shape (N, stop - start).

    z has the accumulator's dtype: fp32, or fp64 for fp64 input. With `by_item` it is
    the transpose, (stop - start, N). z may be overwritten, and is when the next comes.
    """
    step = tile_rows(h)
    product = LogitProduct(h, step)
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        own = None if bias is None else bias[start:stop]
        yield start, stop, product(weight[start:stop], own, by_item)


class LogitProduct:
    """z = h wᵀ + b for one set of items after another, all in the same memory where that helps.

    Fresh memory for every tile costs a CPU as much as a fifth of the product, which oneDNN gains
    twice over; it takes none that is given.
    """

    def __init__(self, h: Tensor, most_items: int) -> None:
        self._rows = h.detach().to(torch.promote_types(h.dtype, torch.float32))
        self._memory = None if suits(self._rows) else self._rows.new_empty(len(h) * most_items)

    def __call__(self, items: Tensor, bias: Tensor | None, by_item: bool = False) -> Tensor:
        """Logits of items (C, D), bias (C,): (N, C), or (C, N) with `by_item`."""
        items, n = items.detach().to(self._rows.dtype), len(self._rows)
        own = None if bias is None else bias.detach().to(items.dtype)
        if self._memory is None:
            if not by_item:
                return product(self._rows, items, own)
            z = product(items, self._rows)
            return z if own is None else z.add_(own[:, None])
        z = self._memory[: n * len(items)]
        z = z.view(len(items), n) if by_item else z.view(n, len(items))
        factors = (items, self._rows.T) if by_item else (self._rows, items.T)
        if own is None:
            return torch.mm(*factors, out=z)
        return torch.addmm(own[:, None] if by_item else own, *factors, out=z)


def exp_minus_(z: Tensor, shift: Tensor, power: float = 1.0) -> Tensor:
    """exp(z − shift)^power in the place of z."""
    z.sub_(shift)
    if on_gpu(z):
        return z.mul_(power).exp_() if power != 1.0 else z.exp_()
    # On CPUs torch takes four times as long for exp as for exp2.
    return z.mul_(power * _LOG2_E).exp2_()


@register_op(lambda h, **_: h.new_empty(len(h), dtype=torch.promote_types(h.dtype, torch.float32)))
def softmax_lse(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the log-sum-exp of every row's logits.

        lse_n = log Σ_v exp(h_n · w_v + b_v)

    Streams over tiles of items; the same as `torch.logsumexp(h @ weight.T + bias, 1)` in fp32.

    Args:
        h: (N, D) hidden states.
        weight: (V, D) item vectors.
        bias: (V,), or None for none.

    Returns:
        (N,), fp32 or wider.
    """
    if use_triton("softmax_lse", h, weight, bias):
        from fisherkern.ops import softmax_lse_triton

        return softmax_lse_triton.softmax_lse(h, weight, bias)
    dtype = torch.promote_types(h.dtype, torch.float32)
    lse = torch.full((h.shape[0],), -torch.inf, dtype=dtype, device=h.device)
    for _, _, z in logit_tiles(h, weight, bias):
        lse = torch.logaddexp(lse, torch.logsumexp(z, dim=1))
    return lse


def softmax_lse_reference(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the fp64 twin of `softmax_lse`; holds all logits."""
    return torch.logsumexp(reference_logits(h, weight, bias), dim=1)


def reference_logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """All logits in fp64, (N, V); for the twins only."""
    z = h.double() @ weight.double().T
    return z if bias is None else z + bias.double()


def num_ranges(num_items: int) -> int:
    """Ranges that a catalogue has; the last one may be shorter."""
    return -(-num_items // RANGE)


def chosen_range(total: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range each u (N, k) falls into, the mass below; total (N, P): running sums."""
    part = torch.searchsorted(total, u, right=True).clamp_(max=total.shape[1] - 1)
    return part, torch.where(part > 0, total.gather(1, (part - 1).clamp_(min=0)), 0.0)
