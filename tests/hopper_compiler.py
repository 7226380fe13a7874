"""Compiles the Triton kernels for sm_90 without a GPU; run by test_compile_hopper.py.

    python hopper_compiler.py [--share I/N] [--kinds KIND,...] WIDTH [WIDTH...]

The ops' own launch code runs on small tensors of every width, with kernels that note what
they are called with: what is compiled is what a launch would have compiled, pointer types,
alignment and constants included. Prints one JSON line for each binary: the launches (kernel,
kind of dtypes, width of D) that it serves, registers, stack and shared memory as
`cuobjdump -res-usage` reads them, and the number of matrix instructions.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fisherkern.ops.softmax_lse import RANGE
from fisherkern.ops.softmax_topk import MAX_TRITON_K

ARCHITECTURE = 90
CPU = torch.device("cpu")
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MODULES = {
    name: importlib.import_module(f"fisherkern.ops.{name}_triton")
    for name in (
        "softmax_lse",
        "softmax_topk",
        "softmax_moments",
        "softmax_sketch",
        "head_sqgrad",
        "sample_items",
        "sample_distinct",
        "segment_outer_square",
    )
}

# h's dtype, and that of the weight and the bias.
KINDS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "mixed": (torch.float32, torch.bfloat16),
}
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


class Binary(NamedTuple):
    """What one binary is compiled from; two launches that agree in this share it."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int


Launched = tuple[Binary, tuple[int, ...]]


class Noted:
    """A kernel whose launches note their arguments and do nothing."""

    def __init__(self, kernel: JITFunction, launches: list[Launched]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(
        self, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int, **kwargs: Any
    ) -> None:
        signature, constants, aligned = [], [], []
        for parameter in self._kernel.params:
            name = parameter.name
            value = kwargs[name] if name in kwargs else args[parameter.num]
            one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            if value is None or parameter.is_constexpr or one:
                signature.append((name, "constexpr"))
                constants.append((name, value))
                continue
            signature.append((name, TYPES[value.dtype] if isinstance(value, Tensor) else "i32"))
            size = value.data_ptr() if isinstance(value, Tensor) else value
            if size % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(name)
        found = tuple(signature), tuple(constants), tuple(aligned)
        binary = Binary(self._kernel.__name__, *found, num_warps, num_stages)
        self._launches.append((binary, grid))


def kernels() -> Iterator[tuple[Any, str, JITFunction]]:
    """(module, attribute, kernel) of every kernel that launch code calls."""
    for module in MODULES.values():
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                yield module, name, value


def run_every_op(kind: str, width: int, n: int, v: int, device: torch.device) -> None:
    """Every op's launch code, with a bias and without; what comes out is noise."""
    k, probes = 2, 4
    of_h, of_w = KINDS[kind]
    zeros = functools.partial(torch.zeros, device=device)
    h, weight = zeros(n, width, dtype=of_h), zeros(v, width, dtype=of_w)
    lse, mean, rows = zeros(n), zeros(n, width), torch.arange(n, device=device)
    ids, omega = zeros(n, k, dtype=torch.int64), zeros(n, k)
    for bias in (zeros(v, dtype=of_w), None):
        layer = (h, weight, bias)
        MODULES["softmax_lse"].softmax_lse(*layer)
        MODULES["softmax_topk"].softmax_topk(*layer, MAX_TRITON_K)
        MODULES["softmax_moments"].softmax_mean(*layer)
        MODULES["softmax_moments"].softmax_covariance(*layer, lse, mean)
        MODULES["softmax_sketch"].softmax_sketch(*layer, lse, mean, rows, probes, 0)
        # The second row on of larger Fishers, as of a range of a table's rows.
        fishers = zeros(v + 1, width)[1:], zeros(v + 1)[1:]
        MODULES["head_sqgrad"].head_sqgrad_(*fishers, *layer, lse, None, None)
        MODULES["head_sqgrad"].head_sqgrad_(*fishers, *layer, lse, ids, omega)
        mass = zeros(n, -(-v // RANGE), dtype=torch.float64)
        MODULES["sample_items"].sample_items(*layer, lse, mass, rows, k, 0)
        MODULES["sample_distinct"].range_logits(*layer, ids)
    # A Linear of D columns, over a few positions and over many.
    for positions in (20, 200):
        delta = zeros(2, n, positions, width, dtype=of_h)
        inputs = zeros(n, positions, width, dtype=of_w)
        fisher = zeros(width, width)
        MODULES["segment_outer_square"].segment_outer_square_(fisher, delta, inputs)


def launches_of(
    kind: str, width: int, n: int = 3, v: int = RANGE + 5, device: torch.device = CPU
) -> list[Launched]:
    """Every launch, of n sequences and v items; on the meta device of any number."""
    launches: list[Launched] = []
    originals = list(kernels())
    try:
        for module, name, kernel in originals:
            setattr(module, name, Noted(kernel, launches))
        run_every_op(kind, width, n, v, device)
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)
    return launches


def binaries(kinds: list[str], widths: list[int]) -> dict[Binary, list[tuple[str, int]]]:
    """Every binary that launches of these kinds and widths need: (kind, width) of each."""
    found: dict[Binary, list[tuple[str, int]]] = {}
    for kind in kinds:
        for width in widths:
            for binary in dict.fromkeys(binary for binary, _ in launches_of(kind, width)):
                found.setdefault(binary, []).append((kind, width))
    return found


def compiled(binary: Binary) -> Any:
    """`triton.compile`'s result for sm_90."""
    function = next(kernel for _, _, kernel in kernels() if kernel.__name__ == binary.kernel)
    attributes = {
        (function.arg_names.index(name),): [["tt.divisibility", 16]] for name in binary.aligned
    }
    source = ASTSource(function, dict(binary.signature), dict(binary.constants), attributes)
    options = {"num_warps": binary.warps, "num_stages": binary.stages}
    return triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options)


def resources(binary: Any) -> dict[str, Any]:
    """Registers, stack and local memory of a thread, shared memory of a block, in bytes."""
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
        "wide": len(re.findall(r"ld\.global\S*\.v4|cp\.async\S* \[.*, 0x10", binary.asm["ptx"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", default="0/1", help="which of how many processes this is")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("widths", nargs="+", type=int)
    arguments = parser.parse_args()
    share, shares = map(int, arguments.share.split("/"))
    found = binaries(arguments.kinds.split(","), arguments.widths)
    for binary, launches in list(found.items())[share::shares]:
        names = {
            "kernel": binary.kernel.removesuffix("_kernel"),
            "launches": launches,
            "without": [name for name, value in binary.constants if value is None],
        }
        print(json.dumps(names | resources(compiled(binary))), flush=True)


if __name__ == "__main__":
    main()
