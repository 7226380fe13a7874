"""What the kernels share: the tile of logits, and how tensors and sizes reach a launch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.ops import counter_rng
from fisherkern.ops.backend import interpreted
from fisherkern.ops.launch_table import TARGET_PROGRAMS, Launch, launch

INTERPRETED = interpreted()

# Sizes that change from batch to batch: one binary serves them all. What the binary depends on
# is dtypes, the width of D, and whether D is a multiple of 16 where a result has D columns.
SIZES = ["n", "v", "k", "m", "t", "pairs", "count", "blocks", "probes", "ranges"]

# exp(x) is 2^(x log2 e), and a multiplication that joins a subtraction costs nothing. The fp32
# number nearest to log2 e and, in fp64, its inverse: going there and back loses nothing.
LOG2_E = tl.constexpr(1.4426950216293335)
PER_LOG2_E = tl.constexpr(1 / 1.4426950216293335)

GOLDEN = tl.constexpr(counter_rng.GOLDEN)
MIX_1 = tl.constexpr(counter_rng.MIX_1)
MIX_2 = tl.constexpr(counter_rng.MIX_2)

_DOT_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


# All that a binary knows of a size is whether it is a multiple of 16, and of an address whether it
# is one of 16 bytes; from both follows that rows can be read 16 bytes at once.
_MULTIPLE = 16

# Items and rows are counted in int32, which a tile past the last one must not leave.
_MOST_ROWS = 2**31 - 2**16


def kernel_input(tensor: Tensor | None) -> Any:
    """Contiguous and aligned, as the kernels' offsets and binaries assume."""
    if tensor is None:
        return None
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        # The interpreter computes wrong numbers from bf16; in fp32 the values are the same.
        tensor = tensor.float()
    tensor = tensor.detach().contiguous()
    # A view into the middle of other memory, such as one file's tensors, may begin anywhere.
    return tensor.clone() if tensor.data_ptr() % _MULTIPLE else tensor


def padded(matrix: Tensor) -> Tensor:
    """`kernel_input`, with columns of zeros added up to a multiple of 16.

    Rows of 50 numbers begin at any address: a kernel would read 2 to 8 bytes at once, could
    copy nothing asynchronously, and would spill. Columns of zeros change no logit, and results
    are cut to D columns, in the kernel where they are added to a Fisher. A multiple of 16 and
    not of the width tile: the products are the same, the tile's masks are 1 to 3 % of its
    instructions, and D = 48, 80, 112 or 208 needs no copy.

    The copy lasts for one call of an op: 256 MB in fp32 for a million items at D = 50, written
    once where the kernel reads as much for every tile of rows. A caller of many ops can pad
    once: a matrix of such a width is taken as it is.
    """
    if max(matrix.shape) > _MOST_ROWS:
        raise InputError(f"the Triton kernels take {_MOST_ROWS} items at most: {matrix.shape[0]}")
    missing = -matrix.shape[-1] % _MULTIPLE
    if missing:
        matrix = torch.nn.functional.pad(matrix.detach(), (0, missing))
    result: Tensor = kernel_input(matrix)
    return result


@contextlib.contextmanager
def fp32_accumulator(fisher: Tensor | None) -> Iterator[Tensor | None]:
    """A contiguous fp32 tensor to add to; what is not that already is brought up to date after."""
    if fisher is None or (fisher.dtype == torch.float32 and fisher.is_contiguous()):
        yield fisher
        return
    sums = torch.zeros(fisher.shape, dtype=torch.float32, device=fisher.device)
    yield sums
    fisher += sums


def dot_settings(kernel: str, h: Tensor, weight: Tensor) -> tuple[Launch, dict[str, Any]]:
    """The row for h and weight, and the constants of `logit_tile` that follow from it."""
    dtype = torch.promote_types(h.dtype, weight.dtype)
    row = launch(kernel, h.device, dtype)
    width = width_tile(h.shape[1], row.width)
    constants = {
        "WIDTH": width,
        "CHUNKS": triton.cdiv(h.shape[1], width),
        "DOT": _DOT_DTYPES[dtype],
        "num_warps": row.warps,
        "num_stages": row.stages,
    }
    return row, constants


def width_tile(width: int, most: int) -> int:
    """Columns taken at once: a power of two, at least the 16 that a product needs."""
    return int(min(max(16, triton.next_power_of_2(width)), most))


def item_splits(num_items: int, tile: int, programs: int) -> tuple[int, int]:
    """(number of splits, items in each but the last): ranges that programs stream over.

    `programs` is what the grid has without splitting. A split is whole tiles, and
    their number depends on the sizes alone.
    """
    tiles = triton.cdiv(num_items, tile)
    splits = min(tiles, max(1, TARGET_PROGRAMS // programs))
    length = triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, length), length * tile


@triton.jit
def logit_tile(
    a_ptr, b_ptr, rows, columns, n, v, d,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a[rows] · b[columns]ᵀ in fp32, (rows, columns); a (n, d), b (v, d), int64 indices.

    Rows past n and columns past v give zeros.
    """
    z = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for chunk in range(CHUNKS):
        k = chunk * WIDTH + tl.arange(0, WIDTH)
        a_mask = (rows < n)[:, None] & (k < d)[None, :]
        b_mask = (k < d)[:, None] & (columns < v)[None, :]
        a = tl.load(a_ptr + rows[:, None] * d + k[None, :], mask=a_mask, other=0.0)  # (rows, WIDTH)
        b = tl.load(b_ptr + columns[None, :] * d + k[:, None], mask=b_mask, other=0.0)
        z = tl.dot(a.to(DOT), b.to(DOT), z, input_precision=PRECISION)
    return z


@triton.jit
def splitmix64(x):
    """splitmix64's finaliser, as in counter_rng.py; the masks make int64's shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def random_words(keys, columns):
    """`counter_rng.random_bits_at` for rows whose `counter_rng.row_keys` are `keys`, int64."""
    return splitmix64(keys + columns * GOLDEN)


@triton.jit
def add_bias(z, bias_ptr, items, v):
    """z (rows, items) plus the items' biases, −inf past the last item."""
    if bias_ptr is not None:
        z += tl.load(bias_ptr + items, mask=items < v, other=0.0).to(tl.float32)[None, :]
    return tl.where((items < v)[None, :], z, float("-inf"))


@triton.jit
def add_to_lse(z, highest, total):
    """(highest, total) of a running Σ exp = total · 2^highest, with a tile z added."""
    new = tl.maximum(highest, tl.max(z, 1) * LOG2_E)
    # A row that is all −inf so far has no finite maximum to subtract.
    shift = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp2(highest - shift) + tl.sum(tl.exp2(z * LOG2_E - shift[:, None]), 1)
    return new, total


@triton.jit
def lse_of(highest, total):
    """log(total · 2^highest) in fp64, of what `add_to_lse` gave."""
    return highest.to(tl.float64) * PER_LOG2_E + tl.log(total.to(tl.float64))
