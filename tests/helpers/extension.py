"""What tests of the compiled extension share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

NO_EXTENSION = "fisherkern._C was not built here"


def guarded(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers with NaN before and after them, so that reading past the ends shows."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=g).to(dtype)
    whole = torch.full((values.numel() + 4096,), torch.nan, dtype=dtype)
    whole[2048 : 2048 + values.numel()] = values.flatten()
    return whole[2048 : 2048 + values.numel()].view(shape)


def tf32(x: Tensor) -> Tensor:
    """x with 10 bits of mantissa, to nearest, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def brute_segments(delta: Tensor, inputs: Tensor, offsets: Sequence[int]) -> Tensor:
    """Σ_r Σ_n (Σ_t δ aᵀ)² in float64, a loop over probes, segments and positions."""
    total = torch.zeros(delta.shape[2], inputs.shape[1], dtype=torch.float64)
    for d in delta.double():
        for start, stop in itertools.pairwise(offsets):
            product = torch.zeros_like(total)
            for t in range(start, stop):
                product += torch.outer(d[t], inputs[t].double())
            total += product.square()
    return total


def assert_close(found: Tensor, exact: Tensor, factor: float = 1e-5) -> None:
    error = float((found.double().cpu() - exact).abs().max())
    assert error <= factor * max(float(exact.abs().max()), 1e-30), error


# (R, lengths, O, I): one of everything; primes; empty segments first, last and between;
# nothing at all; no positions; a chunk of 16 and of 32 positions less and more; F of one
# tile of 64 or 128 and a little more; rows that start on 16 bytes and rows that do not.
SEGMENTS: list[tuple[int, list[int], int, int]] = [
    (1, [1], 1, 1),
    (3, [2, 3, 5, 7], 13, 17),
    (2, [0, 0, 4, 0, 1, 0], 7, 8),
    (1, [], 3, 5),
    (2, [0, 0], 3, 5),
    (1, [15, 16, 17, 31, 32, 33, 65], 16, 24),
    (2, [50, 1], 65, 72),
    (1, [40, 3], 136, 130),
    (1, [33], 136, 200),
]
