"""The CPU loops of the extension under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.sanitized_extension

compiles csrc/ with both into a temporary folder and runs the tests of the loops on it: odd shapes,
every vector width, every number of threads. A read or write outside a tensor, a misaligned access
or an overflow ends the run with the line of the source that made it. First it makes one such error
itself, so that silence means something.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("bind.cpp", *sorted(f"cpu/{p.name}" for p in (ROOT / "csrc/cpu").glob("*.cpp")))
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-fPIC", "-pthread"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TESTS = (
    "tests/ops/test_extension.py",
    "tests/ops/test_segment_forms.py",
    "tests/ops/test_attention_backward.py",
    "tests/ops/test_layer_norm_backward.py",
)
# Before anything imports `fisherkern._C`, this one stands in its place.
LOAD = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_C", sys.argv[1])
spec = importlib.util.spec_from_file_location("_C", sys.argv[1], loader=loader)
extension = importlib.util.module_from_spec(spec)
loader.exec_module(extension)
sys.modules["fisherkern._C"] = extension
import fisherkern.ops.build
assert fisherkern.ops.build.load_extension() is extension
"""
# As `_extension` calls it, but for positions that are not there.
WRONG = """
import torch
fisher, delta, inputs = torch.zeros(3, 5), torch.ones(1, 4, 3), torch.ones(4, 5)
extension.segment_outer_square_cpu(
    fisher=fisher.data_ptr(), delta=delta.data_ptr(), inputs=inputs.data_ptr(), offsets=0,
    offset_bytes=0, length=400, probes=1, positions=400, segments=1, rows=3, columns=5,
    precision=0, threads=1,
)
"""
RUN = """
import pytest
chosen = ["-q", "-p", "no:cacheprovider", "-k", "not emulated and not cuda and not wrong_numbers"]
sys.exit(pytest.main([*chosen, *sys.argv[2:]]))
"""


def main() -> int:
    """Compile, make an error, run the tests; the status of the last."""
    libraries = [_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    if None in libraries:
        print("g++ is missing, or has no libasan and libubsan: nothing is checked", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        built = _build(Path(folder))
        environment = os.environ | {
            "LD_PRELOAD": ":".join(str(library) for library in libraries),
            # Python and PyTorch keep memory until they end.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }

        def run(code: str, *arguments: str, **options: bool) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", LOAD + code, str(built), *arguments]
            return subprocess.run(command, cwd=ROOT, env=environment, text=True, **options)

        wrong = run(WRONG, capture_output=True)
        if "heap-buffer-overflow" not in wrong.stderr:
            print(f"a read outside a tensor was not seen:\n{wrong.stderr}", file=sys.stderr)
            return 1
        return run(RUN, *TESTS).returncode


def _library(name: str) -> Path | None:
    """The path of one of g++'s own libraries, None where it has none."""
    try:
        asked = subprocess.check_output(["g++", f"-print-file-name={name}"], text=True)
    except OSError:
        return None
    path = Path(asked.strip())
    return path.resolve() if path.is_absolute() and path.exists() else None


def _build(folder: Path) -> Path:
    include = ["-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"]]

    def compile_one(source: str) -> str:
        target = str(folder / f"{Path(source).stem}.o")
        command = ["g++", *FLAGS, *SANITIZERS, *include, "-c", f"csrc/{source}", "-o", target]
        subprocess.run(command, cwd=ROOT, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    built = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *SANITIZERS, *objects, "-o", str(built)], check=True)
    return built


if __name__ == "__main__":
    sys.exit(main())
