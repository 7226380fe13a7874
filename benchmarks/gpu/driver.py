"""The compiled kernels without PyTorch, for a sanitizer: python driver.py LIBRARY [--host]

Small calls of all nine segment kernels and of the lookups, their results compared with loops in
float64. Memory is CUDA's own, an allocation for each array, so that an overrun is one. With
--host the library is the emulation of the tests and memory is the host's.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import itertools
import sys
from typing import Any

import numpy as np

LENGTHS = (0, 1, 15, 16, 17, 33, 2)
SHAPES = ((2, 16, 24), (3, 136, 136), (2, 13, 17))  # (R, O, I): aligned, larger than a tile, odd


class Memory:
    """Arrays on the device through the driver's API, or where they are."""

    def __init__(self, host: bool) -> None:
        self.cuda = None if host else ctypes.CDLL("libcuda.so.1")
        if self.cuda is not None:
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self.call("cuInit", 0)
            self.call("cuDeviceGet", ctypes.byref(device), 0)
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.cuda, name)(*arguments)
        if status != 0:
            raise SystemExit(f"{name} ended with {status}")

    def put(self, array: np.ndarray) -> int:
        """The address of a copy; memory is never given back, as the process is short."""
        array = np.ascontiguousarray(array)
        if self.cuda is None:
            kept.append(array)
            return array.ctypes.data
        address, size = ctypes.c_uint64(), ctypes.c_size_t(max(1, array.nbytes))
        self.call("cuMemAlloc_v2", ctypes.byref(address), size)
        if array.nbytes:
            pointer = ctypes.c_void_p(array.ctypes.data)
            self.call("cuMemcpyHtoD_v2", address, pointer, ctypes.c_size_t(array.nbytes))
        return address.value

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        if self.cuda is None:
            return next(a for a in kept if a.ctypes.data == address)
        found = np.empty_like(like)
        self.call("cuCtxSynchronize")
        pointer = ctypes.c_void_p(found.ctypes.data)
        size = ctypes.c_size_t(found.nbytes)
        self.call("cuMemcpyDtoH_v2", pointer, ctypes.c_uint64(address), size)
        return found


kept: list[np.ndarray] = []


def load(path: str) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("_C", path)
    spec = importlib.util.spec_from_file_location("_C", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The upper halves of floats."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def rounded(x: np.ndarray, precision: int) -> np.ndarray:
    """The numbers that a kernel of that precision multiplies."""
    if precision == 1:
        return ((x.view(np.uint32) + 0x1000) & ~np.uint32(0x1FFF)).view(np.float32)
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) if precision == 2 else x


def segment(c: Any, memory: Memory, shape: tuple, precision: int, tile: int, wide: int) -> float:
    """The error of one launch, as a share of the largest number."""
    rng = np.random.default_rng(0)
    starts = np.cumsum((0, *LENGTHS))
    probes, rows, columns = shape
    positions, splits = int(starts[-1]), 3
    delta = rng.standard_normal((probes, positions, rows), dtype=np.float32)
    inputs = rng.standard_normal((positions, columns), dtype=np.float32)
    fisher = np.zeros((rows, columns), np.float32)
    exact = np.zeros((rows, columns))
    for r, (start, stop) in itertools.product(range(probes), itertools.pairwise(starts)):
        d, a = (rounded(x, precision)[start:stop].astype(float) for x in (delta[r], inputs))
        exact += (d.T @ a) ** 2
    address = memory.put(fisher)
    given = [bfloat16(x) if precision == 2 else x for x in (delta, inputs)]
    offsets = starts.astype(np.int32 if wide == 4 else np.int64)
    c.segment_outer_square_cuda(
        fisher=address, delta=memory.put(given[0]), inputs=memory.put(given[1]),
        offsets=memory.put(offsets), offset_bytes=wide, length=0, probes=probes,
        positions=positions, segments=len(LENGTHS), rows=rows, columns=columns,
        precision=precision, device=0, stream=0, tile=tile, splits=splits,
        workspace=memory.put(np.full((splits, rows, columns), np.nan, np.float32)),
    )  # fmt: skip
    return float(np.abs(memory.get(address, fisher) - exact).max() / exact.max())


def lookup(c: Any, memory: Memory, width: int, half: bool, crossed: bool) -> float:
    """Two rows, three segments, one of two positions; two probes."""
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((2, 4, width), dtype=np.float32)
    hidden = rng.standard_normal((2, width), dtype=np.float32)
    beta = rng.standard_normal((3, 2), dtype=np.float32)
    order, start = np.array([0, 2, 1, 3]), np.array([0, 2, 3, 4])
    row, sequence, row_start = np.array([0, 2, 2]), np.array([0, 0, 1]), np.array([0, 1, 3])
    fisher, exact = np.zeros((3, width), np.float32), np.zeros((3, width))
    used = rounded(delta, 2) if half else delta
    for u, r in itertools.product(range(3), range(2)):
        s = used[r, order[start[u] : start[u + 1]]].astype(float).sum(0)
        exact[row[u]] += s * (s + (beta[u, r] * hidden[sequence[u]] if crossed else 0))
    address = memory.put(fisher)
    c.lookup_square_cuda(
        fisher=address, delta=memory.put(bfloat16(delta) if half else delta),
        order=memory.put(order), segment_start=memory.put(start), row=memory.put(row),
        row_start=memory.put(row_start), beta=memory.put(beta) if crossed else 0,
        hidden=memory.put(hidden) if crossed else 0,
        sequence=memory.put(sequence) if crossed else 0, probes=2, positions=4, segments=3,
        groups=2, rows=3, width=width, sequences=2 if crossed else 0, delta_bf16=half, device=0,
        stream=0, tile=64, splits=2,
        workspace=memory.put(np.full((2, 2, width), np.nan, np.float32)),
    )  # fmt: skip
    return float(np.abs(memory.get(address, fisher) - exact).max() / np.abs(exact).max())


def main(path: str, host: bool) -> None:
    c, memory, wrong, count = load(path), Memory(host), [], 0
    for shape, precision, tile, wide in itertools.product(SHAPES, range(3), (64, 128), (4, 8)):
        count += 1
        error = segment(c, memory, shape, precision, tile, wide)
        if not error <= 1e-5:
            wrong.append(f"segments {shape}, precision {precision}, tile {tile}: {error:.1e}")
    for width, half, crossed in itertools.product((64, 13), (False, True), (False, True)):
        count += 1
        error = lookup(c, memory, width, half, crossed)
        if not error <= 1e-5:
            wrong.append(f"lookups of width {width}, bf16 {half}, beta {crossed}: {error:.1e}")
    print("\n".join(wrong) or f"{count} calls are right")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main(sys.argv[1], "--host" in sys.argv[2:])
