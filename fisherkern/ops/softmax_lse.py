"""Tiles of the logits z = h Wᵀ + b, and their log-sum-exp.

Every op of the output layer streams over these tiles, so that no N×V matrix is
ever held beyond one of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherkern.ops._dispatch import use_triton
from fisherkern.ops._library import register

# Elements of one (N, tile) block of logits: 8 MB in fp32. The whole ML-1M
# catalogue is one tile at N = 256; ten million items never need more than this.
TILE_ELEMENTS = 2**21


def tile_rows(num_rows: int) -> int:
    """Items a tile holds for `num_rows` sequences."""
    return max(256, TILE_ELEMENTS // max(num_rows, 1))


def logit_tiles(
    h: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, z) with z = h W[start:stop]ᵀ + b[start:stop], shape (N, stop - start).

    z has the accumulator's dtype: fp32, or fp64 for fp64 input.
    """
    dtype = torch.promote_types(h.dtype, torch.float32)
    rows = h.to(dtype)
    step = tile_rows(h.shape[0])
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        z = rows @ weight[start:stop].to(dtype).T
        if bias is not None:
            z += bias[start:stop].to(dtype)
        yield start, stop, z


def _softmax_lse(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if use_triton(h, weight, bias):
        from fisherkern.ops import softmax_lse_triton

        return softmax_lse_triton.softmax_lse(h, weight, bias)
    dtype = torch.promote_types(h.dtype, torch.float32)
    lse = torch.full((h.shape[0],), -torch.inf, dtype=dtype, device=h.device)
    for _, _, z in logit_tiles(h, weight, bias):
        lse = torch.logaddexp(lse, torch.logsumexp(z, dim=1))
    return lse


def _fake(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return h.new_empty((h.shape[0],), dtype=torch.promote_types(h.dtype, torch.float32))


_op = register("softmax_lse(Tensor h, Tensor weight, Tensor? bias) -> Tensor", _softmax_lse, _fake)


def softmax_lse(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """log Σ_v exp(h·w_v + b_v) for every row: (N, D), (V, D), (V,) -> (N,), fp32 or wider."""
    return _op(h, weight, bias)


def softmax_lse_reference(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The fp64 twin of `softmax_lse`; holds all logits."""
    return torch.logsumexp(reference_logits(h, weight, bias), dim=1)


def reference_logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """All logits in fp64, (N, V); for the twins only."""
    z = h.double() @ weight.double().T
    return z if bias is None else z + bias.double()
