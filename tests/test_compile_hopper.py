"""Every kernel and launch-table row compiles for sm_90 without spilling; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fisherkern.ops.launch_table import rows_of_table

ROWS = [(kernel, kind) for kernel, architecture, kind, _ in rows_of_table() if architecture == 90]
SHARED_LIMIT = 227 * 1024  # bytes a block may have on sm_90
# A hidden state taken in one piece, and one that takes several.
WIDTHS = (64, 256)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], dict]:
    """What hopper_compiler.py printed for each kernel, dtype and width."""
    pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")
    cache = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("hopper_compiler.py")
    run = subprocess.run(
        [sys.executable, str(script), *map(str, WIDTHS)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    return {(line["kernel"], line["kind"], line["width"]): line for line in found}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kernel, kind", ROWS)
def test_a_row_fits_the_chip(kernel: str, kind: str, width: int, compiled: dict) -> None:
    row = compiled[kernel, kind, width]
    assert row["stack"] == 0 and row["local"] == 0, row
    assert 0 < row["shared"] + row["registers"] and row["shared"] <= SHARED_LIMIT, row
