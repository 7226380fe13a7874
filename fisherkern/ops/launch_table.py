"""Tiles, warps and stages of every kernel: the only place launch settings stand.

Keyed by (kernel, architecture, dtype of the products' inputs), "half" being fp16 and
bf16. What the numbers are held by: on sm_90 no kernel uses local memory (stack 0, no
spills) and none more shared memory than a block may have; `tests/test_compile_hopper.py`
compiles each row. Nothing tunes itself at run time.
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

    rows: sequences (segment_outer_square_: outputs O); items: items of the catalogue
    (segment_outer_square_: inputs I); width: most columns of D taken at once
    (segment_outer_square_: positions). Each is a power of two, at least 16 where it
    is an extent of a matrix product.
    """

    rows: int
    items: int
    width: int
    warps: int
    stages: int


_TABLE: dict[tuple[str, int, str], Launch] = {
    ("softmax_lse", 90, "fp32"): Launch(64, 64, 64, 4, 2),
    ("softmax_lse", 90, "half"): Launch(64, 128, 64, 4, 3),
    ("softmax_topk", 90, "fp32"): Launch(64, 64, 32, 8, 2),
    ("softmax_topk", 90, "half"): Launch(64, 64, 64, 8, 2),
}


def launch(kernel: str, device: torch.device, dtype: torch.dtype) -> Launch:
    """The row of `kernel` for the newest architecture in the table that `device` reaches.

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
