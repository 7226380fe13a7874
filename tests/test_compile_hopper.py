"""Every kernel compiles for sm_90, as it is launched, without spilling; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fisherkern.ops.launch_table import rows_of_table

KERNELS = sorted({kernel.rstrip("_") for kernel, *_ in rows_of_table()})
SHARED_LIMIT = 227 * 1024  # bytes a block may have on sm_90
PROCESSES = 2
# A hidden state taken in one piece; and one taken in several, that is padded and whose Fisher's
# rows begin anywhere. What else a launch may be compiled for is slow: three times as much.
CHOSEN = [(kind, width) for kind in ("fp32", "bf16", "mixed") for width in (64, 200)]
ALL = [
    (kind, width)
    for kind in ("fp32", "bf16", "fp16", "mixed")
    for width in (50, 64, 100, 128, 200, 256)
]
Binaries = dict[tuple[str, str, int], list[dict]]


def compiled(cases: list[tuple[str, int]], cache: Path) -> Binaries:
    """What hopper_compiler.py printed, by kernel, kind of dtypes and width of D."""
    pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    script = str(Path(__file__).with_name("hopper_compiler.py"))
    kinds = ",".join(dict.fromkeys(kind for kind, _ in cases))
    widths = [str(width) for width in dict.fromkeys(width for _, width in cases)]
    running = [
        subprocess.Popen(
            [sys.executable, script, f"--share={share}/{PROCESSES}", f"--kinds={kinds}", *widths],
            env={**environment, "TRITON_CACHE_DIR": str(cache / str(share))},
            stdout=subprocess.PIPE,
            stderr=(cache / f"{share}.log").open("w"),
            text=True,
        )
        for share in range(PROCESSES)
    ]
    printed = [process.communicate()[0] for process in running]
    for share, process in enumerate(running):
        assert process.returncode == 0, (cache / f"{share}.log").read_text()
    found: Binaries = {}
    for line in map(json.loads, "".join(printed).splitlines()):
        for kind, width in line["launches"]:
            found.setdefault((line["kernel"], kind, width), []).append(line)
    return found


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Binaries:
    return compiled(CHOSEN, tmp_path_factory.mktemp("chosen"))


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Binaries:
    return compiled(ALL, tmp_path_factory.mktemp("every"))


def assert_fits(binaries: list[dict]) -> None:
    """No local memory, shared memory that a block may have, and rows read 16 bytes at once."""
    for binary in binaries:
        assert binary["stack"] == 0 and binary["local"] == 0, binary
        assert 0 < binary["shared"] + binary["registers"], binary
        assert binary["shared"] <= SHARED_LIMIT, binary
        assert binary["wide"] > 0 or binary["kernel"] == "sample_items_total", binary


@pytest.mark.parametrize("kind, width", CHOSEN)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_fits_the_chip(kernel: str, kind: str, width: int, chosen: Binaries) -> None:
    assert_fits(chosen[kernel, kind, width])


@pytest.mark.slow
@pytest.mark.parametrize("kind, width", ALL)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_fits_at_every_width(kernel: str, kind: str, width: int, every: Binaries) -> None:
    assert_fits(every[kernel, kind, width])


@pytest.mark.parametrize("n, v", [(2**22, 2**18), (256, 2**31 - 2**16)])
def test_grids_hold_every_size(n: int, v: int) -> None:
    """CUDA takes 2³¹ − 1 programs along the first dimension of a grid, 65,535 along others."""
    pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")
    from hopper_compiler import launches_of

    launches = launches_of("bf16", 256, n, v, torch.device("meta"))
    assert {binary.kernel.removesuffix("_kernel") for binary, _ in launches} == set(KERNELS)
    for binary, (programs, *others) in launches:
        assert 0 < programs < 2**31, binary.kernel
        assert all(0 < size <= 65535 for size in others), binary.kernel
