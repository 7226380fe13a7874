"""Units that call programs: the machine's state, the build, sanitizers, Nsight Compute, SASS."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu.day import ROOT, Day
from fisherkern.ops.proven import kernel_hashes

SCRIPT = ROOT / "benchmarks" / "gpu_day.py"
DRIVER = Path(__file__).with_name("driver.py")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Names of our kernels in binaries; PyTorch's are slow under a sanitizer and not the subject.
KERNELS = (
    "softmax_(lse|topk|mean|covariance|sketch)_kernel|head_sqgrad_(sparse_)?kernel"
    "|sample_(items|items_total|distinct)_kernel|segment_outer_square_kernel"
    "|lookup_square_kernel|add_splits_kernel|add_row_splits_kernel"
)
SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats",
    "Occupancy", "LaunchStats", "SourceCounters", "SchedulerStats",
)  # fmt: skip
ABSENT = "not on this machine"


def program(name: str) -> str | None:
    """Its path, also in CUDA's usual folder or among Triton's own tools."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(name, path=Path(spec.origin).parent / "backends/nvidia/bin")
    return found


def environment(day: Day, unit: str) -> None:
    """Versions, the GPU's state, and which tools answer."""
    about: dict[str, Any] = {"python": platform.python_version(), "cpus": os.cpu_count()}
    for name in ("torch", "triton", "numpy", "safetensors", "pybind11"):
        try:
            about[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            about[name] = None
    commands = {
        "nvcc": ["--version"], "ncu": ["--version"], "compute-sanitizer": ["--version"],
        "cuobjdump": ["--version"], "nvidia-smi": ["-q"],
    }  # fmt: skip
    for name, arguments in commands.items():
        path = program(name)
        if path is None:
            about[name] = ABSENT
            continue
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20)
        (day.work / f"env.{name}.log").write_text(done.stdout + done.stderr)
        about[name] = done.stdout.strip().splitlines()[-1:] if name != "nvidia-smi" else path
    commit = day.carried / "commit.txt"
    about["hashes"] = kernel_hashes()
    about["commit"] = commit.read_text().strip() if commit.exists() else "unknown"
    (day.work / "env.json").write_text(json.dumps(about, indent=1))
    day.emit("other", unit=unit, ok=True, **about)


def build(day: Day, unit: str) -> None:
    """fisherkern._C with kernels for this GPU alone; in a dry run they are made for the CPU."""
    if day.dry:
        emulated = _emulated()
        folder = day.work / "emulated"
        folder.mkdir(exist_ok=True)
        emulated.build(folder)
        day.emit("other", unit=unit, ok=True, what="emulated")
        return
    import torch

    arch = "".join(map(str, torch.cuda.get_device_capability()))
    more = {"FISHERKERN_CUDA": "1", "FISHERKERN_CUDA_ARCHS": arch}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **more}, capture_output=True, text=True
    )
    used = ""
    if done.returncode == 0 and (tool := program("cuobjdump")) is not None:
        read = [tool, "-res-usage", str(library(day))]
        used = subprocess.run(read, capture_output=True, text=True).stdout
    (day.work / "build.log").write_text(done.stdout + done.stderr + used)
    tail = done.stderr.strip().splitlines()[-3:] if done.returncode else []
    built = done.returncode == 0
    hashes = kernel_hashes(extension(day)) if built else {}
    day.emit("other", unit=unit, ok=built, what=f"sm_{arch}", said=tail, hashes=hashes)


def _emulated() -> Any:
    sys.path.insert(0, str(ROOT / "tests"))
    import emulated_extension

    return emulated_extension


def library(day: Day) -> Path:
    """The extension's file: built in place, or emulated in a dry run."""
    folder = day.work / "emulated" if day.dry else ROOT / "fisherkern"
    return folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


@functools.cache
def extension(day: Day) -> Any:
    """The module, with CUDA kernels or their emulation. Raises ImportError where there is none."""
    path = library(day)
    loader = importlib.machinery.ExtensionFileLoader("fisherkern._C", str(path))
    spec = importlib.util.spec_from_file_location("fisherkern._C", path, loader=loader)
    if not path.exists() or spec is None:
        raise ImportError(f"{path} was not built")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def child(day: Day, unit: str) -> list[str]:
    """The command that runs one unit of this day in a process of its own."""
    command = [sys.executable, str(SCRIPT), "--unit", unit, "--part", day.part]
    command += ["--out", str(day.out), "--work", str(day.work), "--carried", str(day.carried)]
    return command + ["--dry"] * day.dry


def sanitize(day: Day, unit: str, tool: str, subject: str) -> None:
    """One sanitizer over small calls of the Triton kernels, or the extension without PyTorch.

    PyTorch's caching allocator would hide an overrun into the next tensor. initcheck sees
    all kernels: what a kernel that it does not watch has written would count as unwritten.
    """
    path = program("compute-sanitizer")
    target = child(day, "small:all") if subject == "triton" else drive(day)
    choices = [[]] if tool == "initcheck" else [["--kernel-regex", f"kns={KERNELS}"], []]
    log = day.work / f"sanitizer-{tool}-{subject}.log"
    for choice in choices:
        options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *choice]
        command = [path or "compute-sanitizer", *options, *target]
        if path is None or day.dry:
            missing(day, unit, command)
            return
        more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with log.open("w") as stream:
            code = subprocess.run(
                command, env={**os.environ, **more}, stdout=stream, stderr=subprocess.STDOUT
            ).returncode
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log.read_text(errors="replace"))
        if summary or code == 0:
            break  # else the option is spelled otherwise in this version
    ours = len(re.findall(KERNELS, log.read_text(errors="replace")))
    # PyTorch's own kernels may leave parts of their workspaces unwritten: that is not ours.
    ok = bool(summary) and (code == 0 or (tool == "initcheck" and ours == 0))
    day.emit("other", unit=unit, ok=ok, what=f"status {code}", said=summary, ours=ours,
             filtered=bool(choice))  # fmt: skip


def drive(day: Day) -> list[str]:
    where = ["--host"] if day.dry else []
    return [sys.executable, str(DRIVER), str(library(day)), *where]


def driver(day: Day, unit: str) -> None:
    """The driver by itself, before any sanitizer watches it."""
    done = subprocess.run(drive(day), capture_output=True, text=True)
    (day.work / "driver.log").write_text(done.stdout + done.stderr)
    said = (done.stdout + done.stderr).strip().splitlines()[-2:]
    day.emit("other", unit=unit, ok=done.returncode == 0, what="driver", said=said)


def missing(day: Day, unit: str, command: Sequence[str]) -> None:
    """Not a failure: the command that would have run."""
    day.emit("other", unit=unit, ok=True, what=ABSENT, command=" ".join(command))


def profile(day: Day, unit: str, group: str) -> None:
    """Nsight Compute's sections of one launch of each kernel of a group, at its best setting."""
    path, report = program("ncu"), day.work / f"ncu-{group}"
    sections = [part for name in SECTIONS for part in ("--section", name)]
    command = [
        path or "ncu",
        "--clock-control",
        "none",
        "--export",
        str(report),
        "--force-overwrite",
    ]
    command += ["--kernel-name", f"regex:({KERNELS})", "--launch-count", "12", *sections]
    command += child(day, f"launch:{group}")
    if path is None or day.dry:
        missing(day, unit, command)
        return
    with day.alone():
        done = subprocess.run(command, capture_output=True, text=True)
    (day.work / f"ncu-{group}.log").write_text(done.stdout + done.stderr)
    read = [path, "--import", f"{report}.ncu-rep", "--page", "raw", "--csv"]
    text = subprocess.run(read, capture_output=True, text=True).stdout
    (day.work / f"ncu-{group}.csv").write_text(text)
    ok = done.returncode == 0 and text.count("\n") > 2
    day.emit("other", unit=unit, ok=ok, what="ncu", rows=text.count("\n"))


def disassemble(day: Day, unit: str, group: str) -> None:
    """SASS of each kernel at its best setting, from a Triton cache that holds nothing else."""
    tool, cache = program("cuobjdump"), day.work / f"sass-{group}"
    command = child(day, f"launch:{group}")
    if tool is None or day.dry:
        missing(day, unit, ["TRITON_CACHE_DIR=" + str(cache), *command])
        return
    more = {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True)
    found = sorted(cache.rglob("*.cubin"))
    for cubin in found:
        text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True).stdout
        (day.work / f"sass-{group}-{cubin.stem}-{cubin.parent.name[:8]}.sass").write_text(text)
    day.emit("other", unit=unit, ok=done.returncode == 0 and bool(found), what="sass",
             files=len(found))  # fmt: skip


def figure(day: Day, unit: str, which: str) -> None:
    """Figure 2 and the exact Fisher of all of MovieLens-1M, with the model that travels along."""
    command = [sys.executable, "-m", "benchmarks.speed.bench_fisher"]
    command += ["--out", str(day.work / "models")]
    model = day.carried / "bert4rec.safetensors"
    if day.dry:
        command += ["--data", "synthetic", "--max-len", "5", "--dim", "6", "--epochs", "1"]
        command += ["--sequences", "8", "--repeats", "1", "--limit", "0.01", "--only", "exact"]
    elif not model.exists():
        day.emit("other", unit=unit, ok=False, what=f"{model} is not there: --prepare was not run")
        return
    else:
        command += ["--data", "ml-1m", "--model", str(model)]
        whole = ["--sequences", "6040", "--only", "exact", "--repeats", "3"]
        command += whole if which == "all" else ["--limit", "2"]
    results = day.work / "results"
    results.mkdir(exist_ok=True)
    more = {"FISHERKERN_RESULTS": str(results)}
    if not day.dry:
        more["FISHERKERN_DATA"] = str(day.carried)
    with day.alone():
        done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True)
    (day.work / f"figure-{which}.log").write_text(done.stdout + done.stderr)
    said = (done.stdout + done.stderr).strip().splitlines()[-2:]
    day.emit("engine", unit=unit, ok=done.returncode == 0, what=f"bench_fisher {which}", said=said)
