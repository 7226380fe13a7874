"""Random numbers keyed by position instead of drawn in order.

A number depends only on (seed, row, column), so results do not change with the
batch size, the chunk or the tile. The generator is splitmix64 (Steele, Lea and
Flood, OOPSLA 2014) applied to a mixed key; int64 arithmetic wraps as it needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherkern.ops.backend import on_gpu

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
    """Return the part of the numbers' keys that a row's columns share, int64."""
    signed_seed = (seed + 2**63) % 2**64 - 2**63
    return _mix(_mix(row * GOLDEN + signed_seed) + GOLDEN)


def uniform(seed: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Uniform numbers in [0, 1): (N,) rows, (C,) columns -> (N, C) float64 with 53 random bits."""
    return _shift_right(random_bits(seed, rows, columns), 11).double() * 2.0**-53


def gumbel_at(seed: int, row: Tensor, column: Tensor) -> Tensor:
    """Draw standard Gumbel numbers −log(−log u), float64, by int64 tensors that broadcast."""
    # 52 bits and a half: neither 0 nor 1, whose logarithms are not finite.
    u = (_shift_right(random_bits_at(seed, row, column), 12).double() + 0.5) * 2.0**-52
    return u.log_().neg_().log_().neg_()


def signs(bits: Tensor, probe: int, dtype: torch.dtype) -> Tensor:
    """±1 from bit `probe` (0..63) of `bits`, elementwise."""
    return 1 - 2 * ((bits >> probe) & 1).to(dtype)


# Rows that take their signs from one word: making words costs ten times what using a bit does.
_ROWS_OF_A_WORD = 32


def sign_keys(seed: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where a row's signs are: (the key of its words (N,), the bit of them (N,)), int64.

    The sign of (row, column) is bit 63 − row mod 32 of the word keyed by (seed, ⌊row/32⌋,
    column): words are shared by rows, never by columns, so that the signs of a row's
    columns, and those of a column's rows, are as independent as the generator's bits.
    """
    return row_keys(seed, rows // _ROWS_OF_A_WORD), 63 - rows % _ROWS_OF_A_WORD


def random_signs_at(seed: int, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    """Independent ±1 for each (row, column), int64 tensors of one shape."""
    keys, bit = sign_keys(seed, row)
    return 1 - 2 * ((_mix(keys + column * GOLDEN) >> bit) & 1).to(dtype)


def apply_random_signs_(values: Tensor, seed: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply values (N, C), none negative, by `random_signs_at` (N,) rows, (C,) columns."""
    if on_gpu(rows):
        # A GPU makes a row's words faster than it tells how many rows share them.
        words = (random_bits(seed, rows // _ROWS_OF_A_WORD, columns) >> 32).int()
    else:
        groups, index = torch.unique(rows // _ROWS_OF_A_WORD, return_inverse=True)
        # index_select copies whole rows, where indexing goes number by number.
        words = (random_bits(seed, groups, columns) >> 32).int().index_select(0, index)
    # The row's bit becomes the sign bit of a float that lends it to the value.
    words <<= (rows % _ROWS_OF_A_WORD).int()[:, None]
    return values.copysign_(words.view(torch.float32))


# A row's number in the keys of the buckets; no sequence has it.
_BUCKETS = -1


def bucket_rotations(seed: int, blocks: Tensor, probes: int) -> Tensor:
    """Return a random number below `probes` for each block, int64."""
    bits = random_bits_at(seed, torch.full_like(blocks, _BUCKETS), blocks)
    return _shift_right(bits, 33) % probes


def catalogue_rotations(seed: int, num_items: int, probes: int, device: torch.device) -> Tensor:
    """`bucket_rotations` of the blocks of `probes` items that a catalogue has."""
    return bucket_rotations(seed, torch.arange(-(-num_items // probes), device=device), probes)


def bucket_of(seed: int, column: Tensor, probes: int) -> Tensor:
    """Return the bucket, 0 … probes − 1, of each column, int64.

    The `probes` columns of a block (columns R j … R j + R − 1) take one bucket each, in an
    order turned by a random number: columns of different blocks meet with probability
    1/R, those of one block never.
    """
    return (column + bucket_rotations(seed, column // probes, probes)) % probes


def members_by_bucket(
    seed: int, probes: int, first: int, count: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield columns first … first + count − 1 of each bucket of `bucket_of`, int64."""
    blocks = torch.arange(first // probes, -(-(first + count) // probes), device=device)
    rotations = bucket_rotations(seed, blocks, probes)
    # Made on the CPU once more: a GPU would be waited for. Only in the outermost blocks may a
    # column be outside.
    ends = blocks[:1].cpu(), blocks[-1:].cpu()
    outermost = [(int(end), int(bucket_rotations(seed, end, probes))) for end in ends if len(end)]
    for bucket in range(probes):
        members = blocks * probes + (bucket - rotations) % probes
        columns = [block * probes + (bucket - turned) % probes for block, turned in outermost]
        if columns and columns[1] >= first + count:
            members = members[:-1]
        if columns and columns[0] < first:
            members = members[1:]
        yield members
