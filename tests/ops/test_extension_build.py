"""What the build of the extension promises: what it holds and needs, and what it says."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fisherkern.ops.build import load_extension

ROOT = Path(__file__).resolve().parents[2]


def built_library() -> Path:
    built = load_extension()
    if built is None:
        pytest.skip("fisherkern._C was not built here")
    assert built.__file__ is not None
    return Path(built.__file__)


def test_the_library_needs_neither_torch_nor_cuda() -> None:
    library = built_library()
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.check_output(["readelf", "-dW", library], text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert needed and not [n for n in needed if re.search("torch|c10|cuda", n)]
    symbols = subprocess.check_output(["readelf", "-sW", "--dyn-syms", library], text=True)
    undefined = re.findall(r"\bUND (\S+)", symbols)
    assert undefined and not [s for s in undefined if re.search("torch|c10|^_?cuda|^cu[A-Z]", s)]


def test_the_library_holds_code_for_every_architecture() -> None:
    library = built_library()
    archs, ptx = load_extension().cuda_archs, load_extension().cuda_ptx  # type: ignore[union-attr]
    if not archs:
        pytest.skip("fisherkern._C was built without CUDA kernels")
    triton = pytest.importorskip("triton", reason="no cuobjdump: triton brings one")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    elf = subprocess.check_output([tool, "-lelf", library], text=True)
    assert {int(a) for a in re.findall(r"\.sm_(\d+)\.cubin", elf)} == set(archs)
    text = subprocess.check_output([tool, "-lptx", library], text=True)
    assert {int(a) for a in re.findall(r"\.sm_(\d+)\.ptx", text)} == set(ptx)
    usage = subprocess.check_output([tool, "-res-usage", library], text=True)
    stacks = [int(s) for s in re.findall(r"STACK:(\d+)", usage)]
    assert stacks and not any(stacks), "a kernel uses local memory"


def test_setup_does_not_import_torch() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert modules <= sys.stdlib_module_names | {"setuptools", "pybind11"}


def build(tmp_path: Path, path: Sequence[str | Path] = (), **environment: str) -> tuple[int, str]:
    """(exit status, output) of a build without nvcc, in a folder of its own."""
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    arguments = ["--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib"]
    blocked = tmp_path / "blocked"
    (blocked / "torch").mkdir(parents=True)
    (blocked / "torch/__init__.py").write_text("raise SystemExit('torch was imported')")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *arguments],
        cwd=ROOT,
        env=os.environ
        | {"PATH": os.pathsep.join(map(str, path)), "PYTHONPATH": str(blocked)}
        | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_without_a_compiler_the_extension_is_left_out(tmp_path: Path) -> None:
    status, output = build(tmp_path, [tmp_path], CC="no-such-compiler", CXX="no-such-compiler")
    assert status == 0, output
    assert "no nvcc on PATH" in output
    assert "the extension is left out" in output
    assert not list(tmp_path.rglob("_C*.so"))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FISHERKERN_CUDA": "1"}, "FISHERKERN_CUDA=1 asks for the CUDA kernels, but there is no"),
        ({"FISHERKERN_CUDA": "yes"}, "'yes' is not one of auto, 0, 1"),
        ({"FISHERKERN_CUDA_ARCHS": "sm_90"}, "'sm_90' is not like 90, 9.0 or 100+PTX"),
        ({"FISHERKERN_CUDA_ARCHS": "9.0;7.5"}, "75 is below 80, which the kernels need"),
    ],
)
def test_the_build_says_what_is_wrong(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    status, output = build(tmp_path, [tmp_path], **environment)
    assert status != 0 and message in output and "Traceback" not in output
