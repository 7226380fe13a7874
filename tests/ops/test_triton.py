"""The Triton kernels in the interpreter, and which implementation an op takes."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from models import HISTORIES, bert

import fisherkern as fk
from fisherkern import ops
from fisherkern.ops import backend

HERE = Path(__file__).parent
OPS = [
    "softmax_lse",
    "softmax_topk",
    "sample_items",
    "sample_distinct",
    "softmax_mean",
    "softmax_covariance",
    "softmax_sketch",
    "head_sqgrad",
    "segment_outer_square",
]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every check in interpreted_*.py: "" where it passed, else what went wrong."""
    pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop(backend.VARIABLE, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, f"--junitxml={report}", *map(str, sorted(HERE.glob("interpreted_*.py")))],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert report.exists(), run.stdout + run.stderr
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes[case.attrib["name"]] = "\n".join(child.text or child.tag for child in case)
    return outcomes


@pytest.mark.parametrize("op", OPS)
def test_kernel_against_its_twin(op: str, interpreted: dict[str, str]) -> None:
    own = {name: text for name, text in interpreted.items() if name.startswith(f"test_{op}")}
    assert own, f"interpreted_ops.py has no check of {op}"
    wrong = {name: text for name, text in own.items() if text}
    assert not wrong, "\n\n".join(f"{name}\n{text}" for name, text in wrong.items())


def test_nothing_else_failed(interpreted: dict[str, str]) -> None:
    named = tuple(f"test_{op}" for op in OPS)
    rest = {name: text for name, text in interpreted.items() if not name.startswith(named)}
    assert not any(rest.values()), rest


def test_backend_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """The innermost block, then the environment, then auto."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert backend.backend() == "auto"
    monkeypatch.setenv(backend.VARIABLE, "triton")
    assert backend.backend() == "triton"
    with backend.use_backend("torch"):
        assert backend.backend() == "torch"
        with backend.use_backend("auto"):
            assert backend.backend() == "torch"
        assert backend.backend() == "torch"
    monkeypatch.setenv(backend.VARIABLE, "tpu")
    with pytest.raises(fk.InputError, match="FISHERKERN_BACKEND: 'tpu' is not one of auto"):
        ops.softmax_lse(torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(fk.InputError, match="backend: 'tpu' is not one of auto, torch, triton"):
        backend.use_backend("tpu").__enter__()


def test_cpu_tensors_take_pytorch_unless_triton_is_demanded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "_installed", lambda: True)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    one = torch.ones(1, 1)
    assert not backend.use_triton("softmax_lse", one, one)
    with backend.use_backend("triton"):
        with pytest.raises(fk.InputError, match="takes TRITON_INTERPRET=1"):
            ops.softmax_lse(one, one)
        with pytest.raises(fk.InputError, match="not torch.float64"):
            ops.softmax_lse(one.double(), one.double())
        with pytest.raises(fk.InputError, match="backend: 'triton' cannot be used"):
            fk.diag_fisher(bert().float(), [HISTORIES], k=2, progress=False)
    with pytest.raises(fk.InputError, match="backend: 'triton' cannot be used"):
        fk.diag_fisher(bert().float(), [HISTORIES], k=2, backend="triton", progress=False)
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    assert not backend.use_triton("softmax_lse", one, one)
    with backend.use_backend("triton"):
        assert backend.use_triton("softmax_lse", one, one)
        assert not backend.use_triton("softmax_lse", one[:0], one)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # every import of it raises ImportError
import torch
import fisherkern as fk
from fisherkern import ops
from fisherkern.ops import backend
ops.softmax_lse(torch.ones(1, 1), torch.ones(1, 1))
with backend.use_backend("triton"):
    try:
        ops.softmax_lse(torch.ones(1, 1), torch.ones(1, 1))
    except fk.InputError as error:
        print(error)
"""


def test_everything_imports_without_triton() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True
    )
    assert run.stdout == "backend: 'triton' cannot be used: triton is not installed\n"


def test_triton_is_not_imported_before_a_kernel_runs() -> None:
    source = (
        "import sys, torch, fisherkern\n"
        "from fisherkern import ops\n"
        "ops.softmax_topk(torch.ones(2, 2), torch.ones(3, 2), None, 2)\n"
        "print([name for name in sys.modules if name.endswith('_triton')])\n"
    )
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
