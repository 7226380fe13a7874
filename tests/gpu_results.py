"""A run on a GPU that never was: lines as benchmarks/gpu_day.py writes them, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import prove

GPU = {"device": "NVIDIA H100", "arch": 90}
SHAPES = ((3, 7), (33, 1031), (257, 3706), (64, 100_000))
Line = dict[str, Any]


@pytest.fixture(scope="module")
def today() -> dict[str, str]:
    return prove.hashes_of_tree()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, today: dict[str, str]) -> Path:
    """An empty run of today's kernels, in a repository of its own."""
    monkeypatch.setattr(prove, "ROOT", tmp_path)
    monkeypatch.setattr(prove, "hashes_of_tree", lambda: today)
    folder = tmp_path / "benchmarks/results/gpu_2027-01-01"
    folder.mkdir(parents=True)
    (folder / "env.json").write_text(json.dumps({"hashes": today}))
    return folder


def write(folder: Path, name: str, lines: list[Line]) -> None:
    text = "".join(json.dumps(GPU | line) + "\n" for line in lines)
    (folder / f"{name}.jsonl").write_text(text)


def checks(
    op: str = "softmax_lse", dtype: str = "float32", widths: tuple[int, ...] = (50, 64)
) -> list[Line]:
    """A right check of everything that an op of the output layer is asked."""
    found = []
    for d in widths:
        for n, v in SHAPES + (((4096, 1_000_000),) if d == 64 else ()):
            names = ["lse", "the same bits again", "second stream: lse"]
            names += ["bias none: lse", "bias impossible: lse"] if v == 1031 else []
            for backend in ("triton", "torch"):
                unit = f"check:{op}:{dtype}:{d}"
                line = {"unit": unit, "op": op, "backend": backend, "dtype": dtype, "s": 0.1}
                line |= {"D": d, "N": n, "V": v, "of_allowed": 0.5, "ok": True}
                found += [{**line, "what": what} for what in names]
    return found
