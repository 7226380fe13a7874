"""Compiles the Triton kernels for sm_90 without a GPU; run by test_compile_hopper.py.

    python hopper_compiler.py WIDTH [WIDTH...]

Prints one JSON line for each kernel, launch-table row and width of the hidden state:
registers, stack and shared memory as `cuobjdump -res-usage` reads them from the binary,
and the number of matrix instructions.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fisherkern.ops.launch_table import PRECISION, Launch, rows_of_table
from fisherkern.ops.softmax_topk import MAX_TRITON_K

ARCHITECTURE = 90
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# Pointers to something else than the inputs' dtype.
FP32 = (
    "lse_ptr",
    "best_ptr",
    "weight_fisher_ptr",
    "bias_fisher_ptr",
    "omega_ptr",
    "total_ptr",
    "mean_ptr",
    "covariance_ptr",
    "centre_ptr",
    "sums_ptr",
    "totals_ptr",
    "z_ptr",
)
INT64 = ("keys_ptr", "bit_ptr", "ids_ptr", "order_ptr", "stop_ptr", "part_ptr")
FP64 = ("ranges_ptr", "mass_ptr", "below_ptr", "u_ptr")
POINTERS = (
    dict.fromkeys(FP32, "*fp32") | dict.fromkeys(FP64, "*fp64") | dict.fromkeys(INT64, "*i64")
)
POINTERS["softmax_topk.ids_ptr"] = POINTERS["rotation_ptr"] = "*i32"

# Every kernel: its module, and the constants that do not follow from the launch-table row.
KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax_lse": ("softmax_lse", {}),
    "softmax_topk": ("softmax_topk", {"KEPT": MAX_TRITON_K}),
    "head_sqgrad_": ("head_sqgrad", {}),
    "head_sqgrad_sparse": ("head_sqgrad", {}),
    "softmax_mean": ("softmax_moments", {}),
    "softmax_covariance": ("softmax_moments", {}),
    "softmax_sketch": ("softmax_sketch", {}),
    "sample_items_total": ("sample_items", {}),
    "sample_items": ("sample_items", {}),
    "sample_distinct": ("sample_distinct", {}),
    "segment_outer_square_": ("segment_outer_square", {}),
}


def compiled(kernel: str, kind: str, row: Launch, width: int) -> dict[str, Any]:
    module_name, extra = KERNELS[kernel]
    module = importlib.import_module(f"fisherkern.ops.{module_name}_triton")
    function = getattr(module, f"{kernel.rstrip('_')}_kernel")
    constants = {
        "ROWS": row.rows,
        "ITEMS": row.items,
        "WIDTH": min(row.width, width),
        "CHUNKS": triton.cdiv(width, row.width or width),
        "DOT": tl.float32 if kind == "fp32" else tl.bfloat16,
        "PRECISION": PRECISION,
    } | extra
    signature, given, aligned = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            given[(i,)] = constants[name]
            continue
        if name.endswith("_ptr"):
            own = POINTERS.get(name, "*fp32" if kind == "fp32" else "*bf16")
            signature[name] = POINTERS.get(f"{kernel}.{name}", own)
        else:
            signature[name] = "i32"
        if name.endswith("_ptr") or name in ("d", "o", "i"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, given, aligned)
    options = {"num_warps": row.warps, "num_stages": row.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options)
    return resources(binary)


def resources(binary: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([TOOL, "-res-usage", file.name], text=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "shared": binary.metadata.shared,
        "wgmma": binary.asm["ptx"].count("wgmma.mma_async"),
        "mma": binary.asm["ptx"].count("mma.sync"),
    }


def main(widths: list[int]) -> None:
    for kernel, architecture, kind, row in rows_of_table():
        if architecture == ARCHITECTURE:
            for width in widths:
                found = compiled(kernel, kind, row, width)
                print(json.dumps({"kernel": kernel, "kind": kind, "width": width, **found}))


if __name__ == "__main__":
    main([int(width) for width in sys.argv[1:]])
