"""Random numbers keyed by position instead of drawn in order.

A number depends only on (seed, row, column), so results do not change with the
batch size, the chunk or the tile. The generator is splitmix64 (Steele, Lea and
Flood, OOPSLA 2014) applied to a mixed key; int64 arithmetic wraps as it needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask makes the shift logical.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


def random_bits(seed: int, rows: Tensor, columns: Tensor) -> Tensor:
    """64 random bits for every pair: (N,) int64 rows, (C,) int64 columns -> (N, C) int64."""
    return random_bits_at(seed, rows[:, None], columns[None, :])


def random_bits_at(seed: int, row: Tensor, column: Tensor) -> Tensor:
    """64 random bits for each (row, column), int64 tensors that broadcast."""
    return _mix(row_keys(seed, row) + column * GOLDEN)


def row_keys(seed: int, row: Tensor) -> Tensor:
    """The part of the numbers' keys that a row's columns share, int64."""
    signed_seed = (seed + 2**63) % 2**64 - 2**63
    return _mix(_mix(row * GOLDEN + signed_seed) + GOLDEN)


def uniform(seed: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Uniform numbers in [0, 1): (N,) rows, (C,) columns -> (N, C) float64 with 53 random bits."""
    return _shift_right(random_bits(seed, rows, columns), 11).double() * 2.0**-53


def signs(bits: Tensor, probe: int, dtype: torch.dtype) -> Tensor:
    """±1 from bit `probe` (0..63) of `bits`, elementwise."""
    return 1 - 2 * ((bits >> probe) & 1).to(dtype)
