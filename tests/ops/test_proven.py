"""Backend "auto" takes a kernel on a GPU where proven.json has a valid row for the call, only."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fisherkern as fk
from benchmarks import readme_tables
from benchmarks.gpu import prove
from fisherkern import ops
from fisherkern.ops import _extension, backend, build, lookup_square, proven
from fisherkern.ops.launch_table import rows_of_table
from fisherkern.ops.proven import KERNELS, SEGMENTS, Row

ROOT = Path(__file__).resolve().parents[2]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def row_of(op: str, backend: str = "triton", /, **changes: Any) -> Row:
    """A valid row for sm_90, fp32 and D = 33 to 64, with `changes`."""
    widths = proven.widths_of(op, backend)[1 if op != SEGMENTS else 0]
    launch = proven.launch_settings(op, backend, 90, changes.get("dtype", "float32"))
    code = proven.kernel_hash(op, backend) or ""
    row = Row(op, backend, 90, "float32", widths, 1, code, launch, 1000, "a GPU", "no file")
    return dataclasses.replace(row, **changes)


@pytest.fixture(autouse=True)
def no_caches() -> Iterator[None]:
    """What is known once per process is asked again by every test, and after the last."""

    def forget() -> None:
        for cached in (proven.rows, proven.kernel_hash, proven._faster_from):
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()
        backend.architecture.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a call sees of an sm_90, with the rows given; tensors on it are fake."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "_installed", lambda: True)

    def with_rows(*rows: Row) -> None:
        monkeypatch.setattr(proven, "rows", lambda: rows)
        proven._faster_from.cache_clear()

    return with_rows


def on_gpu(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


def takes(op: str = "softmax_lse", n: int = 10, v: int = 100, d: int = 64, **dtypes: Any) -> bool:
    h, weight = dtypes.get("h", FP32), dtypes.get("weight", dtypes.get("h", FP32))
    return backend.use_triton(op, on_gpu(n, d, dtype=h), on_gpu(v, d, dtype=weight), None)


def test_nothing_is_taken_without_a_row(gpu: Any) -> None:
    gpu()
    assert not takes()
    with backend.use_backend("triton"):
        assert takes()
    with backend.use_backend("torch"):
        assert not takes()


def test_a_row_serves_what_it_covers_alone(gpu: Any) -> None:
    gpu(row_of("softmax_lse"))
    assert takes() and takes(d=33) and takes(n=100, v=10)
    assert not takes(d=32) and not takes(d=65)
    assert not takes(n=9) and not takes(op="softmax_mean")
    assert not takes(h=BF16) and not takes(h=FP16) and not takes(weight=BF16)
    assert not takes(h=torch.float64)


@pytest.mark.parametrize(
    "changes",
    [
        {"arch": 100},
        {"dtype": "mixed"},
        {"widths": (65, 128)},
        {"faster_from": None},
        {"faster_from": 1001},
        {"hash": "of another source"},
        {"launch": {"softmax_lse": (16, 16, 16, 4, 1)}},
        {"launch": {}},
        {"op": "softmax_mean"},
        {"backend": "cuda"},
    ],
    ids=str,
)
def test_a_row_of_anything_else_does_not_count(gpu: Any, changes: dict[str, Any]) -> None:
    gpu(dataclasses.replace(row_of("softmax_lse"), **changes))
    assert not takes()


def test_dtypes_and_multiples(gpu: Any) -> None:
    gpu(row_of("softmax_lse", dtype="mixed", multiple_of=16))
    assert takes(weight=BF16) and takes(weight=BF16, d=48)
    assert not takes(weight=BF16, d=50)
    assert not takes(weight=FP16) and not takes(h=BF16, weight=FP32)
    gpu(row_of("softmax_lse", dtype="bfloat16"))
    assert takes(h=BF16) and not takes(h=FP16)


def test_tensors_on_the_cpu_need_no_row(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(row_of("softmax_lse"))
    monkeypatch.setattr(proven, "beats_torch", None)
    assert not backend.use_triton("softmax_lse", torch.ones(10, 64), torch.ones(100, 64), None)


@pytest.fixture
def allow_tf32() -> Iterator[Any]:
    """A function that lets PyTorch take tf32, until the test ends."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ops as a copy that may be changed."""
    folder = tmp_path / "ops"
    shutil.copytree(proven.FILE.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(proven, "FILE", folder / "proven.json")
    return folder


@pytest.mark.parametrize("name", ["softmax_lse_triton", "tiles_triton"])
def test_a_changed_byte_falls_back_to_pytorch(gpu: Any, copied: Path, name: str) -> None:
    gpu(row_of("softmax_lse"), row_of("head_sqgrad_"))
    assert takes() and takes("head_sqgrad_")
    file = copied / f"{name}.py"
    file.write_bytes(file.read_bytes().replace(b"0", b"1", 1))
    proven.kernel_hash.cache_clear()
    proven._faster_from.cache_clear()
    assert not takes()
    assert takes("head_sqgrad_") == (name != "tiles_triton")


def test_rows_come_from_the_file(gpu: Any, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row_of("softmax_lse"), row_of(SEGMENTS, "cuda", hash="a", dtype="tf32")]
    (copied / "proven.json").write_text(proven.text_of(rows))
    assert sorted(proven.read_proven(copied / "proven.json"), key=str) == sorted(rows, key=str)
    assert proven.text_of(reversed_rows := rows[::-1]) == proven.text_of(rows), reversed_rows
    proven.rows.cache_clear()
    assert takes()


def test_sources_are_a_file_and_the_kernels_that_it_imports(copied: Path) -> None:
    names = proven.triton_sources(copied, "softmax_topk_triton.py")
    expected = {"softmax_topk", "softmax_moments", "softmax_lse", "tiles"}
    assert {*names} >= {f"{name}_triton.py" for name in expected}
    (copied / "softmax_lse_triton.py").unlink()
    assert proven.kernel_hash("softmax_topk", "triton") is None
    assert proven.kernel_hash("head_sqgrad_", "triton") is not None


def serving(op: str, dtype: torch.dtype = FP32, **sizes: int) -> bool:
    fisher, delta = on_gpu(64, 256), on_gpu(2, 3, 5, 64, dtype=dtype)
    return _extension.extension_for(op, fisher, delta, **sizes) is not None


def test_the_extension_asks_for_rows_of_its_own(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, allow_tf32: Any
) -> None:
    built = SimpleNamespace(cuda_archs=(90,), cuda_ptx=(), cuda_sources="of csrc")
    monkeypatch.setattr(build, "load_extension", lambda: built)
    sizes = {"width": 64, "size": 1000}
    gpu(row_of(SEGMENTS))
    assert not serving(SEGMENTS, **sizes)
    with backend.use_backend("cuda"):
        assert serving(SEGMENTS, **sizes)
    gpu(row_of(SEGMENTS, "cuda"))
    assert serving(SEGMENTS, **sizes)
    assert not serving(SEGMENTS, width=64, size=999) and not serving(SEGMENTS, width=128, size=1000)
    assert not serving(SEGMENTS, BF16, **sizes) and not serving("lookup_square_", **sizes)
    with backend.use_backend("triton"):
        assert not serving(SEGMENTS, **sizes)
    # tf32 has kernels of its own.
    allow_tf32()
    assert not serving(SEGMENTS, **sizes)
    gpu(row_of(SEGMENTS, "cuda", dtype="tf32"), row_of("lookup_square_", "cuda"))
    assert serving(SEGMENTS, **sizes) and serving("lookup_square_", **sizes)
    built.cuda_sources = "of another csrc"
    proven.kernel_hash.cache_clear()
    proven._faster_from.cache_clear()
    assert not serving(SEGMENTS, **sizes)


def test_every_op_asks_by_its_name_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """N·V and D of the output layer; R·N·T·O·I and min(O, I) of segments; R·N·T·D of lookups."""
    asked: list[tuple[str, str, int, int]] = []

    def use_triton(op: str, first: Tensor, second: Tensor, *_: Any, **sizes: int) -> bool:
        size = sizes.get("size", len(first) * len(second))
        asked.append((op, "triton", sizes.get("width", first.shape[1]), size))
        return False

    def serving(op: str, *_: Any, width: int, size: int) -> None:
        asked.append((op, "cuda", width, size))

    monkeypatch.setattr(_extension, "extension_for", serving)
    for file, _ in proven.TRITON.values():
        monkeypatch.setattr(
            importlib.import_module(f"fisherkern.ops.{file}"), "use_triton", use_triton
        )
    h, weight, rows = torch.randn(3, 8), torch.randn(11, 8), torch.arange(3)
    lse, mean, ranges = ops.softmax_mean(h, weight)
    ops.softmax_lse(h, weight)
    ops.softmax_topk(h, weight, None, 2)
    ops.softmax_covariance(h, weight, None, lse, mean)
    ops.softmax_sketch(h, weight, None, lse, mean, rows, 2, 0)
    ops.sample_items(h, weight, None, lse, ranges, rows, 2, 0)
    ops.sample_distinct(h, weight, None, lse, ranges, rows, 2, 0)
    ops.head_sqgrad_(torch.zeros(11, 8), None, h, weight, None, lse)
    ops.segment_outer_square_(torch.zeros(5, 7), torch.randn(2, 3, 4, 5), torch.randn(3, 4, 7))
    segments = lookup_square.lookup_segments(torch.tensor([[0, 1], [1, 1]]))
    ops.lookup_square_(torch.zeros(2, 6), torch.randn(3, 4, 6), segments)
    sizes = {SEGMENTS: (5, 2 * 3 * 4 * 5 * 7), "lookup_square_": (6, 3 * 4 * 6)}
    expected = {(op, backend, *sizes.get(op, (8, 33))) for op, backend in KERNELS}
    assert {*asked} == expected


def test_every_row_of_the_launch_table_belongs_to_an_op() -> None:
    named = {kernel for _, kernels in proven.TRITON.values() for kernel in kernels}
    assert named == {kernel for kernel, *_ in rows_of_table()}
    hashes = proven.kernel_hashes()
    assert {f"{op}/triton" for op in proven.TRITON} <= hashes.keys()
    assert hashes["launch/softmax_lse/90/fp32"].count(",") == 4
    assert "lookup_square_/cuda" not in hashes
    built = SimpleNamespace(cuda_sources="of csrc")
    assert proven.kernel_hashes(built)["lookup_square_/cuda"] == "of csrc"


def complaints(rows: list[Row], today: dict[str, str]) -> list[str]:
    """What is wrong with committed rows, and what to do."""
    found = []
    for row in rows:
        name = f"{row.op} ({row.backend}) on {row.device}, {row.dtype}, widths {row.widths}"
        reason = proven.stale(row, today[f"{row.op}/{row.backend}"])
        if reason is not None:
            found.append(f"{name}: {reason}")
        if not (ROOT / row.evidence).exists():
            found.append(f"{name}: its evidence {row.evidence} is not there")
    return found


def test_committed_rows_are_about_todays_kernels() -> None:
    found = complaints(proven.read_proven(proven.FILE), prove.hashes_of_tree())
    assert not found, (
        "\n".join(found) + "\nfisherkern/ops/proven.json holds rows that prove nothing any more:"
        " run the kernels on a GPU again (python benchmarks/gpu_day.py, then"
        " benchmarks/gpu/prove.py FOLDER), or take the rows out (python -m benchmarks.gpu.prove);"
        " then python -m benchmarks.readme_tables"
    )


def test_a_stale_committed_row_is_named() -> None:
    today = prove.hashes_of_tree()
    lost, changed = row_of("softmax_lse"), row_of("softmax_mean", hash="", evidence="README.md")
    assert complaints([lost, changed], today) == [
        "softmax_lse (triton) on a GPU, float32, widths (33, 64):"
        " its evidence no file is not there",
        "softmax_mean (triton) on a GPU, float32, widths (33, 64):"
        " the kernel's source has changed since",
    ]


def test_the_table_of_kernels_is_current() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    current = readme_tables.BLOCK.sub(readme_tables.table, text)
    assert text == current, "run python -m benchmarks.readme_tables"
    assert "<!-- table: kernels -->" in text


def test_the_table_of_kernels(tmp_path: Path) -> None:
    empty = readme_tables.kernel_rows([], tmp_path)
    assert empty.startswith("Nothing has run on a GPU yet: no kernel, and no op's path in PyTorch.")
    assert empty.count("| no GPU | PyTorch |") == len(KERNELS)
    (tmp_path / "gpu_2027-01-01").mkdir()
    rows = [
        row_of("softmax_lse"),
        row_of("softmax_lse", dtype="bfloat16", multiple_of=16, faster_from=4_096_000_000),
        row_of("softmax_mean", faster_from=None),
        row_of(SEGMENTS, "cuda"),
    ]
    table = readme_tables.kernel_rows(rows, tmp_path)
    assert table.startswith("Runs on a GPU, in benchmarks/results: `gpu_2027-01-01`.")
    assert (
        "| `softmax_lse` | triton | a GPU (sm_90) | the kernel: sm_90 bfloat16, D 33 to 64,"
        " multiples of 16, N·V ≥ 4,096,000,000; sm_90 float32, D 33 to 64, N·V ≥ 1,000 |" in table
    )
    assert "| `softmax_mean` | triton | a GPU (sm_90) | PyTorch, which was faster |" in table
    assert (
        "| `segment_outer_square_` | cuda | a GPU (sm_90) | the kernel: sm_90 float32,"
        " min(O, I) 1 to 127, R·N·T·O·I ≥ 1,000 |" in table
    )
    assert "| `sample_items` | triton | no GPU | PyTorch |" in table


def test_status_says_why(gpu: Any) -> None:
    gpu(row_of("softmax_lse"), row_of("softmax_mean", hash="", evidence="here"))
    said = proven.kernel_status()
    assert (
        "softmax_lse (triton): ran on a GPU (sm_90); auto takes the kernel: sm_90 float32" in said
    )
    assert (
        "softmax_mean (triton): ran on no GPU; auto takes PyTorch\n"
        "  a row of here does not count: the kernel's source has changed since\n" in said
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"op": "softmax_lse"}]', "row 1 has not the fields of a row"),
        ("[1]", "row 1 has not the fields of a row"),
        (proven.text_of([row_of("softmax_lse", op="softmax")]), "of no kernel: softmax triton"),
        (proven.text_of([row_of("softmax_lse", dtype="fp8")]), "of no kernel"),
        (proven.text_of([row_of("softmax_lse", widths=(1, 256))]), "is no class of widths"),
    ],
)
def test_a_file_of_other_rows_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "proven.json"
    path.write_text(text)
    with pytest.raises(fk.InputError, match=message):
        proven.read_proven(path)


def test_the_extension_says_of_which_sources_it_is() -> None:
    files = [*(ROOT / "csrc/cuda").iterdir(), ROOT / "csrc/fisher_segment.h"]
    named = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in files}
    expected = proven.digest(named)
    assert prove.hashes_of_tree()["lookup_square_/cuda"] == expected
    built = build.load_extension()
    if built is None or not built.cuda_archs:
        pytest.skip("fisherkern._C was built without CUDA kernels")
    assert getattr(built, "cuda_sources", None) == expected, "csrc has changed: run make setup"
    assert proven.kernel_hash("lookup_square_", "cuda") == expected


def test_a_wheel_holds_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    pytest.importorskip("ninja", reason="ninja is not installed")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    egg = ["egg_info", "--egg-base", str(tmp_path)]
    subprocess.run([*command[:3], *egg, *command[3:]], cwd=ROOT, check=True, capture_output=True)
    shipped = tmp_path / "lib" / "fisherkern" / "ops"
    assert (shipped / "proven.json").read_bytes() == proven.FILE.read_bytes()
    assert (shipped.parent / "py.typed").exists()
    name = f"{proven.TRITON['softmax_lse'][0]}_triton.py"
    assert proven.triton_sources(shipped, name) == proven.triton_sources(proven.FILE.parent, name)
