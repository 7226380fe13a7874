"""The extension compiled with its CUDA kernels for the CPU, through tests/cuda_on_cpu."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-Wno-unknown-pragmas", "-fPIC", "-fvisibility=hidden"]
SOURCES = {
    "csrc/bind.cpp": ["-O0", "-DFISHERKERN_WITH_CUDA"],
    "csrc/cpu/attention_backward.cpp": ["-O2"],
    "csrc/cpu/layer_norm_backward.cpp": ["-O2"],
    "csrc/cpu/lookup_square.cpp": ["-O2"],
    "csrc/cpu/segment_outer_square.cpp": ["-O2"],
    "csrc/cuda/lookup_square.cu": ["-O2", "-x", "c++"],
    "csrc/cuda/segment_outer_square.cu": ["-O2", "-x", "c++"],
}


def build(folder: Path) -> Any:
    """Compile into `folder` and load; skips where that takes tools that are not there."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    compiler = shutil.which("g++")
    python = sysconfig.get_paths()["include"]
    if compiler is None or not Path(python, "Python.h").exists():
        pytest.skip("no g++, or no Python.h: the emulated extension cannot be compiled")
    include = ["-I", pybind11.get_include(), "-I", python, "-I", str(ROOT / "tests/cuda_on_cpu")]

    def compile_one(source: str) -> str:
        target = str(folder / (Path(source).name + ".o"))
        command = [compiler, *FLAGS, *include, *SOURCES[source], "-c", source, "-o", target]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)
    loader = importlib.machinery.ExtensionFileLoader("_C", str(library))
    spec = importlib.util.spec_from_file_location("_C", library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def allow_reads(module: Any, *tensors: Tensor) -> None:
    """From now on an asynchronous copy from anywhere else fails its launch."""
    library = ctypes.CDLL(module.__file__)
    library.cuda_on_cpu_forget()
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        library.cuda_on_cpu_allow(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(size))
