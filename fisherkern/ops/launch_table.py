"""Tiles, warps and stages of every kernel: the only place launch settings stand.

Keyed by (kernel, architecture, dtype of the products' inputs), "half" being fp16 and
bf16. Constraints on these numbers: on sm_90 no kernel uses local memory (stack 0, no
spills) and none more shared memory than a block may have, at D = 50, 64, 100, 128, 200 and
256, with Triton 3.6.0 and 3.7.1; `tests/test_compile_hopper.py` compiles each row. Nothing
tunes itself at run time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# fp32 products as three tf32 ones: fp32's accuracy on the tensor cores. "ieee" runs
# beside them and spills at these tiles.
PRECISION = "tf32x3"

# Programs a launch is cut into where the output alone gives fewer: four for each of
# 132 multiprocessors. A constant, so that sums do not depend on the device.
TARGET_PROGRAMS = 528


class Launch(NamedTuple):
    """One row: the tile's extents and the compiler's settings.

    rows: sequences (head_sqgrad_sparse: occurrences of an item); items: items of the
    catalogue; width: the most columns of D taken at once. segment_outer_square_ has a
    tile of rows × items of F and takes width positions at once. Each is a power of two,
    at least 16 where it is an extent of a matrix product, and 0 where a kernel has none.
    """

    rows: int
    items: int
    width: int
    warps: int
    stages: int


# softmax_lse in fp32 has one stage: with more, it spills where D takes several pieces.
_TABLE: dict[tuple[str, int, str], Launch] = {
    ("softmax_lse", 90, "fp32"): Launch(64, 64, 64, 4, 1),
    ("softmax_lse", 90, "half"): Launch(64, 128, 64, 4, 3),
    ("softmax_topk", 90, "fp32"): Launch(64, 64, 32, 8, 2),
    ("softmax_topk", 90, "half"): Launch(64, 64, 64, 8, 2),
    ("head_sqgrad_", 90, "fp32"): Launch(32, 64, 64, 4, 1),
    ("head_sqgrad_", 90, "half"): Launch(32, 64, 64, 4, 2),
    ("head_sqgrad_sparse", 90, "fp32"): Launch(16, 0, 64, 4, 1),
    ("head_sqgrad_sparse", 90, "half"): Launch(16, 0, 64, 4, 1),
    ("softmax_mean", 90, "fp32"): Launch(64, 32, 64, 4, 1),
    ("softmax_mean", 90, "half"): Launch(64, 32, 64, 4, 2),
    ("softmax_covariance", 90, "fp32"): Launch(0, 64, 64, 4, 2),
    ("softmax_covariance", 90, "half"): Launch(0, 64, 64, 4, 2),
    ("softmax_sketch", 90, "fp32"): Launch(64, 32, 64, 4, 1),
    ("softmax_sketch", 90, "half"): Launch(64, 32, 64, 4, 2),
    ("sample_items_total", 90, "fp32"): Launch(0, 512, 0, 4, 1),
    ("sample_items_total", 90, "half"): Launch(0, 512, 0, 4, 1),
    ("sample_items", 90, "fp32"): Launch(0, 128, 32, 4, 2),
    ("sample_items", 90, "half"): Launch(0, 128, 64, 4, 2),
    ("sample_distinct", 90, "fp32"): Launch(0, 128, 64, 4, 2),
    ("sample_distinct", 90, "half"): Launch(0, 128, 64, 4, 2),
    ("segment_outer_square_", 90, "fp32"): Launch(64, 64, 32, 4, 2),
    ("segment_outer_square_", 90, "half"): Launch(64, 64, 64, 4, 3),
}


def launch(kernel: str, device: torch.device, dtype: torch.dtype) -> Launch:
    """Return the row of `kernel` for the newest architecture in the table that `device` reaches.

    Devices older than every row, and the interpreter on the CPU, take the oldest row.
    """
    kind = "fp32" if dtype == torch.float32 else "half"
    known = sorted(arch for name, arch, key in _TABLE if (name, key) == (kernel, kind))
    reached = known[:1]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        reached = [arch for arch in known if arch <= 10 * major + minor] or reached
    return _TABLE[kernel, reached[-1], kind]


def rows_of_table() -> list[tuple[str, int, str, Launch]]:
    """Every row, for the test that compiles them."""
    return [(*key, row) for key, row in _TABLE.items()]


# The compiled segment_outer_square_ of csrc/cuda: most rows and columns of F that a CTA
# takes, 64 or 128. Neither spills on any of these architectures; the larger one reads half
# as much from L2 for the same products.
_OUTER_TILE: dict[tuple[int, str], int] = {
    (80, "fp32"): 128,
    (80, "half"): 128,
    (90, "fp32"): 128,
    (90, "half"): 128,
    (100, "fp32"): 128,
    (100, "half"): 128,
}


def outer_split(
    device: torch.device, dtype: torch.dtype, rows: int, columns: int, pairs: int
) -> tuple[int, int]:
    """Return (sums, tile): how the compiled segment_outer_square_ cuts `pairs` for F."""
    kind = "fp32" if dtype == torch.float32 else "half"
    major, minor = torch.cuda.get_device_capability(device)
    tile = _OUTER_TILE[
        max(a for a, k in _OUTER_TILE if k == kind and a <= 10 * major + minor), kind
    ]
    if min(rows, columns) < tile:
        tile = 64
    programs = -(-rows // tile) * -(-columns // tile)
    return max(1, min(-(-TARGET_PROGRAMS // programs), pairs)), tile


def lookup_splits(probes: int) -> int:
    """Return sums that the compiled lookup_square_ cuts a row into.

    A row of every sequence (the mask token's) has N·R pairs where most have R: it must
    not run long after the others are done.
    """
    return max(1, min(16, probes // 4))
