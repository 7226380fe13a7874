"""Build of the optional extension fisherkern._C; everything else stands in pyproject.toml.

Never imports torch: builds run isolated, where it is not installed, and the extension
takes addresses, so it works with every version of it. Environment:

    FISHERKERN_CUDA        auto (default): CUDA kernels where nvcc is found; 1: fail
                           without them; 0: the CPU part alone
    FISHERKERN_CUDA_ARCHS  compute capabilities, "80,90,100+PTX" by default

Without a C++ compiler the extension is left out, and the package works without it.
pip shows what was built with -v; `fisherkern.ops.build.status()` says it afterwards.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import BaseError, CompileError, LinkError, SetupError

ROOT = Path(__file__).resolve().parent
# Read by fisherkern.provenance; no file of a checkout.
COMMIT = ROOT / "fisherkern" / "commit.txt"
DEFAULT_ARCHS = "80,90,100+PTX"
CPU_SOURCES = (
    "csrc/bind.cpp",
    "csrc/cpu/attention_backward.cpp",
    "csrc/cpu/layer_norm_backward.cpp",
    "csrc/cpu/lookup_square.cpp",
    "csrc/cpu/segment_outer_square.cpp",
)
CUDA_SOURCES = ("csrc/cuda/lookup_square.cu", "csrc/cuda/segment_outer_square.cu")
HEADERS = (
    "csrc/attention.h",
    "csrc/fisher_segment.h",
    "csrc/layer_norm.h",
    "csrc/cpu/gram.h",
    "csrc/cpu/machine.h",
    "csrc/cpu/numbers.h",
    "csrc/cuda/launch.cuh",
    "csrc/cuda/outer_tiles.cuh",
    "csrc/cuda/ptx.cuh",
)


def wants_cuda() -> str:
    """FISHERKERN_CUDA: "auto", "0" or "1"."""
    wanted = os.environ.get("FISHERKERN_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"error: FISHERKERN_CUDA: {wanted!r} is not one of auto, 0, 1")
    return wanted


def cuda_archs() -> tuple[list[int], list[int]]:
    """FISHERKERN_CUDA_ARCHS: the capabilities of machine code, and those of PTX beside it."""
    text = os.environ.get("FISHERKERN_CUDA_ARCHS") or DEFAULT_ARCHS
    code, ptx = [], []
    for name in re.split(r"[,; ]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.?(\d)(\+PTX)?", name)
        if match is None:
            raise SystemExit(
                f"error: FISHERKERN_CUDA_ARCHS: {name!r} is not like 90, 9.0 or 100+PTX"
            )
        arch = int(match[1] + match[2])
        if arch < 80:
            raise SystemExit(
                f"error: FISHERKERN_CUDA_ARCHS: {arch} is below 80, which the kernels need"
            )
        code.append(arch)
        if match[3]:
            ptx.append(arch)
    return code, ptx


def cuda_hash() -> str:
    """sha256 of all that the CUDA kernels are made of; by it proven.json knows them.

    Files in the order of their names, as `fisherkern.ops.proven.digest` takes them.
    """
    headers = ["csrc/fisher_segment.h", *(h for h in HEADERS if h.startswith("csrc/cuda/"))]
    total = hashlib.sha256()
    for name in sorted([*CUDA_SOURCES, *headers]):
        text = (ROOT / name).read_bytes()
        total.update(f"{name} {len(text)}\n".encode() + text)
    return total.hexdigest()


def toolkit(nvcc: str) -> Path:
    """The CUDA toolkit nvcc belongs to. nvcc on PATH may be a wrapper or a link, so it is asked."""
    asked = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
    )
    match = re.search(r"^#\$ TOP=(.+)$", asked.stderr, re.MULTILINE)
    if match is None:
        raise CompileError(f"{nvcc} --dryrun does not name its toolkit:\n{asked.stderr}")
    return Path(match[1].strip()).resolve()


def gencode(code: list[int], ptx: list[int]) -> list[str]:
    flags = []
    for arch in code:
        kinds = f"sm_{arch},compute_{arch}" if arch in ptx else f"sm_{arch}"
        flags += ["-gencode", f"arch=compute_{arch},code=[{kinds}]"]
    return flags


def compile_with_ninja(folder: Path, commands: Mapping[str, Sequence[str]]) -> list[str]:
    """Compile every source with its command, side by side, where the object is not current.

    The object files lie in `folder`, with what ninja knows of their headers and commands.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"builddir = {folder}", "rule compile", "  deps = gcc", "  depfile = $out.d"]
    lines.append("  command = $compiler -MD -MF $out.d -c $in -o $out")
    objects = [str(folder / (Path(source).stem + ".o")) for source in commands]
    for target, (source, command) in zip(objects, commands.items(), strict=True):
        path = re.sub(r"([ :$])", r"$\1", target)
        lines.append(f"build {path}: compile {source}")
        lines.append(f"  compiler = {shlex.join(command).replace('$', '$$')}")
    file = folder / "build.ninja"
    file.write_text("\n".join(lines) + "\n")
    run = [str(Path(ninja.BIN_DIR) / "ninja"), "-v", "-f", str(file)]
    done = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        raise CompileError(f"ninja: exit status {done.returncode}")
    return objects


class BuildExtension(build_ext):
    """Compiles the CUDA part with nvcc where there is one, then the rest as any extension."""

    def build_extension(self, ext: Extension) -> None:
        if self.editable_mode:
            # Not in pip's temporary folder: the next build compiles what changed since.
            plat = f"{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = str(Path("build", f"temp.{plat}"))
        if self.compiler.compiler_type == "unix":
            # Not in the command, by which ninja knows an object: pip's build has pybind11 in a
            # folder of a new name every time.
            paths = (pybind11.get_include(), os.environ.get("CPLUS_INCLUDE_PATH"))
            os.environ["CPLUS_INCLUDE_PATH"] = os.pathsep.join(filter(None, paths))
            self.compiler.compile = self._compile
        else:
            ext.include_dirs.append(pybind11.get_include())
        if not self._build_cuda(ext):
            print("fisherkern: the extension is built without CUDA kernels")
        try:
            super().build_extension(ext)
        except (CompileError, LinkError, BaseError, OSError) as error:
            if wants_cuda() == "1":
                raise
            print(f"fisherkern: the extension is left out, for lack of a C++ compiler: {error}")

    def _build_cuda(self, ext: Extension) -> bool:
        wanted = wants_cuda()
        if wanted == "0":
            return False
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            if wanted == "1":
                raise SetupError(
                    "FISHERKERN_CUDA=1 asks for the CUDA kernels, but there is no nvcc on PATH;"
                    " install the CUDA toolkit and put its bin folder on PATH, or unset"
                    " FISHERKERN_CUDA"
                )
            print("fisherkern: no nvcc on PATH")
            return False
        try:
            self._compile_cuda(ext, nvcc)
        except CompileError as error:
            if wanted == "1":
                raise
            print(f"fisherkern: the CUDA kernels did not compile: {error}")
            return False
        return True

    def _compile_cuda(self, ext: Extension, nvcc: str) -> None:
        code, ptx = cuda_archs()
        top = toolkit(nvcc)
        libraries = next((p for p in (top / "lib64", top / "lib") if p.is_dir()), top / "lib64")
        if not (libraries / "libcudart_static.a").exists():
            raise CompileError(f"{libraries} has no libcudart_static.a")
        flags = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        command = [nvcc, *flags, *gencode(code, ptx)]
        ext.extra_objects += compile_with_ninja(
            Path(self.build_temp) / "cuda", dict.fromkeys(CUDA_SOURCES, command)
        )
        # Static, so that the extension goes with any PyTorch, whatever CUDA it brings.
        ext.library_dirs.append(str(libraries))
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        ext.define_macros += [
            ("FISHERKERN_WITH_CUDA", "1"),
            ("FISHERKERN_CUDA_ARCHS", ",".join(map(str, code))),
            ("FISHERKERN_CUDA_PTX", ",".join(map(str, ptx))),
            ("FISHERKERN_CUDA_SOURCES", cuda_hash()),
        ]

    def _compile(
        self,
        sources: list[str],
        macros: list[tuple[str, str]],
        include_dirs: list[str],
        extra_postargs: list[str],
        **_: Any,
    ) -> list[str]:
        """Stands in for the compiler object's own method, which has one file at a time."""
        command = [*self.compiler.compiler_so_cxx, *extra_postargs]
        command += [f"-D{name}={value}" for name, value in macros]
        command += [f"-I{folder}" for folder in (*include_dirs, *self.compiler.include_dirs)]
        return compile_with_ninja(Path(self.build_temp), dict.fromkeys(sources, command))


def source_commit() -> str | None:
    """The checkout's commit, with "-dirty" if files differ from it, or the sdist's."""
    if not (ROOT / ".git").exists():
        return COMMIT.read_text() if COMMIT.exists() else None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_commit(root: str) -> None:
    """Leave the commit in the copy of the package below `root`: it has no history to ask."""
    commit, path = source_commit(), Path(root, COMMIT.relative_to(ROOT))
    if commit is not None and path.parent.is_dir():
        path.write_text(commit)


class BuildPackage(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            write_commit(self.build_lib)


class SourceRelease(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(base_dir)


COMMANDS = {"build_ext": BuildExtension, "build_py": BuildPackage, "sdist": SourceRelease}

if __name__ == "__main__":
    cuda_archs()  # what the environment has wrong is said at once, whatever is built
    extension = Extension(
        "fisherkern._C",
        sources=list(CPU_SOURCES),
        depends=[*CUDA_SOURCES, *HEADERS],
        language="c++",
        # An editable install then does not miss what was left out.
        optional=wants_cuda() != "1",
        extra_compile_args=(
            ["/std:c++17", "/O2"]
            if sys.platform == "win32"
            else ["-std=c++17", "-O3", "-fvisibility=hidden", "-g0", "-pthread"]
        ),
    )
    setup(ext_modules=[extension], cmdclass=COMMANDS)
