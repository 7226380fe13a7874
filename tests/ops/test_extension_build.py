"""What the build of the extension promises: what it holds and needs, and what it says."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from fisherkern.ops.build import load_extension
from fisherkern.provenance import source_commit

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
    assert modules <= sys.stdlib_module_names | {"setuptools", "pybind11", "ninja"}


def build_module() -> ModuleType:
    """setup.py, imported: it builds nothing then."""
    for needed in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    spec = importlib.util.spec_from_file_location("fisherkern_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_did_not_change_is_not_compiled_again(tmp_path: Path) -> None:
    setup = build_module()
    compiler = shutil.which("g++") or pytest.skip("no g++")
    (tmp_path / "a.h").write_text("const int one = 1;\n")
    (tmp_path / "a.cpp").write_text('#include "a.h"\nint a() { return one; }\n')
    (tmp_path / "b.cpp").write_text("int b() { return 2; }\n")

    def compiled(*flags: str) -> list[int]:
        commands = {str(tmp_path / name): [compiler, *flags] for name in ("a.cpp", "b.cpp")}
        objects = setup.compile_with_ninja(tmp_path / "with space", commands)
        return [Path(path).stat().st_mtime_ns for path in objects]

    first = compiled()
    assert compiled() == first
    (tmp_path / "a.h").write_text("const int one = 11;\n")
    header = compiled()
    assert header[0] > first[0] and header[1] == first[1]
    # Another command is another object.
    assert all(after > before for after, before in zip(compiled("-O1"), header, strict=True))
    (tmp_path / "b.cpp").write_text("int b(\n")
    with pytest.raises(setup.CompileError, match="ninja: exit status 1"):
        compiled()


def test_a_release_knows_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = build_module()
    here = setup.source_commit()
    assert here == source_commit()
    (tmp_path / "fisherkern").mkdir()
    setup.write_commit(str(tmp_path))
    # The unpacked sdist, from which a wheel is built, and the installed package.
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "COMMIT", tmp_path / "fisherkern/commit.txt")
    assert setup.source_commit() == source_commit(tmp_path / "fisherkern") == here


def test_the_citation_has_the_version() -> None:
    found = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found is not None and found[1] == project["version"]


def build(tmp_path: Path, path: Sequence[str | Path] = (), **environment: str) -> tuple[int, str]:
    """(exit status, output) of a build without nvcc, in a folder of its own."""
    build_module()
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
