"""The house rules of the design, held by reading the source: arrows, lengths, no pickle."""

from __future__ import annotations

import ast
import collections
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fisherkern", "tests", "benchmarks", "examples")
UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve")
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 400, 60, 100
MAX_ROOM = 4000  # lines of the files in one folder

# Arrows point from a higher level to a lower one. A module of one level imports nothing
# of its own level but its own package; the exceptions are listed.
LEVELS = {
    "benchmarks": 11,  # no part of the package, which may not import it
    "cli": 10,
    "demo": 9,
    "__init__": 8,
    # Shows what the rooms below measure.
    "report": 6,
    # A weight ensemble starts from a merge.
    "hub": 7,
    "postmerge": 6,
    "alignment": 5,
    "merging": 5,
    "training": 5,
    "evaluation": 5,
    "plots": 5,
    "members": 4,
    "fisher": 4,
    "adapters": 3,
    "objectives": 3,
    "encoders": 3,
    "data": 3,
    "ops": 2,
    "_C": 1,
    "files": 0,
    "documents": 0,
    "interrupts": 0,
    "errors": 0,
    "checks": 0,
    "provenance": 0,
    "fingerprint": 0,
    "modes": 0,
    "progress": 0,
    "tables": 0,
    "processes": 0,
}
# The same thing wherever it is defined: loggers, type variables, tables of a room's handlers, the
# block that files are read in.
ONE_MEANING = {"log", "ModelT", "PathLike", "Self", "T", "HANDLERS", "READ"}
SIDEWAYS = {
    ("objectives", "encoders"),
    ("documents", "errors"),
    ("files", "documents"),
    ("files", "errors"),
    ("checks", "errors"),
    ("processes", "errors"),
    ("processes", "provenance"),
    ("fingerprint", "errors"),
    ("tables", "errors"),
    ("fingerprint", "files"),
}
# `python -m fisherkern` only calls the command line.
ENTRY = {"__main__": "cli"}


def python_files() -> list[Path]:
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [ROOT / "setup.py", *found]


def package_modules() -> list[tuple[str, ...]]:
    """("ops", "softmax_topk"), ("__init__",), ... for every file of the package."""
    root = ROOT / "fisherkern"
    return [path.relative_to(root).with_suffix("").parts for path in sorted(root.rglob("*.py"))]


def imported_parts(tree: ast.AST, module: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """(top part of fisherkern, or "benchmarks", line) of every import of our own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = ["fisherkern", *module[: len(module) - node.level], *base]
            names = [base] if len(base) > 1 else [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "benchmarks":
                yield "benchmarks", node.lineno
            elif name[0] == "fisherkern":
                part = name[1] if len(name) > 1 else "__init__"
                # A name that is no part of the package is one that __init__ re-exports.
                yield (part if part in LEVELS else "__init__"), node.lineno


def wrong_arrows(source: str, module: tuple[str, ...]) -> list[str]:
    own = ENTRY.get(module[0], module[0])
    wrong = []
    for part, line in imported_parts(ast.parse(source), module):
        allowed = part == own or LEVELS[part] < LEVELS[own] or (own, part) in SIDEWAYS
        if not allowed:
            wrong.append(f"{'/'.join(module)}.py:{line}: {own} may not import {part}")
    return wrong


def nn_uses(source: str) -> list[int]:
    """Lines that reach into torch.nn for more than torch.nn.functional."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) != "torch.nn":
            names = [ast.unparse(node)]
        else:
            continue
        parts = [name.split(".") for name in names]
        if any(part[:2] == ["torch", "nn"] and part[2:3] != ["functional"] for part in parts):
            lines.append(node.lineno)
    return lines


def pickle_uses(source: str) -> list[int]:
    """Lines that could run code from a file."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            unsafe = any(alias.name.split(".")[0] in UNSAFE_MODULES for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            unsafe = (node.module or "").split(".")[0] in UNSAFE_MODULES or (
                node.module == "torch" and any(alias.name == "load" for alias in node.names)
            )
        elif isinstance(node, ast.Attribute):
            unsafe = ast.unparse(node) in ("torch.load", "pandas.read_pickle", "pd.read_pickle")
        elif isinstance(node, ast.keyword):
            given = ast.unparse(node.value)
            unsafe = (node.arg, given) in (("weights_only", "False"), ("allow_pickle", "True"))
        else:
            continue
        if unsafe:
            lines.append(node.value.lineno if isinstance(node, ast.keyword) else node.lineno)
    return lines


def long_functions(source: str) -> list[str]:
    """Functions over the limit; a docstring does not count, as the house asks for long ones."""
    too_long = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            docstring = node.body[0]
            length -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
        if length > (MAX_KERNEL if kernel else MAX_FUNCTION):
            too_long.append(f"{node.name} has {length} lines")
    return too_long


def test_every_part_of_the_package_has_a_level():
    unknown = {module[0] for module in package_modules()} - LEVELS.keys() - ENTRY.keys()
    assert not unknown, f"say in tests/test_house.py where these stand: {sorted(unknown)}"


@pytest.mark.parametrize("module", package_modules(), ids="/".join)
def test_arrows_point_one_way(module):
    path = ROOT / "fisherkern" / Path(*module).with_suffix(".py")
    assert wrong_arrows(path.read_text(encoding="utf-8"), module) == []


def defined_names(source):
    """Public functions, classes and constants at a module's top level."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def names_of_several(sources):
    """Name -> the modules that define it, where there are several."""
    modules = collections.defaultdict(list)
    for module, source in sources.items():
        for name in defined_names(source):
            modules[name].append(module)
    several = {name: found for name, found in modules.items() if len(found) > 1}
    return {name: found for name, found in several.items() if name not in ONE_MEANING}


def test_a_public_name_has_one_meaning():
    root = ROOT / "fisherkern"
    sources = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(root.rglob("*.py"))
    }
    found = {
        name: modules
        for name, modules in names_of_several(sources).items()
        # An op's name is also that of its kernel's launch and of its call into the extension.
        if not all(module.startswith("ops/") for module in modules)
    }
    assert found == {}


def test_a_name_of_two_meanings_is_seen():
    sources = {
        "a.py": "class Rows: ...\nlog = 1",
        "b.py": "Rows: int = 3\nlog = 2",
        "c.py": "_x = 1",
    }
    assert names_of_several(sources) == {"Rows": ["a.py", "b.py"]}


def test_ops_know_no_modules():
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / "fisherkern" / "ops").rglob("*.py"))
        if (lines := nn_uses(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_nothing_unpickles():
    found = {
        str(path.relative_to(ROOT)): lines
        for path in python_files()
        if (lines := pickle_uses(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    length = len(source.splitlines())
    assert length <= MAX_FILE
    assert long_functions(source) == []


def test_rooms_are_small() -> None:
    lines: collections.Counter[str] = collections.Counter()
    for path in (ROOT / "fisherkern").rglob("*.py"):
        room = path.parent.relative_to(ROOT).as_posix()
        lines[room] += len(path.read_text(encoding="utf-8").splitlines())
    assert {room: length for room, length in lines.items() if length > MAX_ROOM} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (("ops", "a"), "from fisherkern.fisher import x"),
        (("ops", "a"), "def f():\n    import fisherkern.encoders.base"),
        (("data", "a"), "from fisherkern import encoders"),
        (("data", "a"), "from ..encoders.base import x"),
        (("data", "a"), "from .. import training"),
        (("encoders", "a"), "from fisherkern.objectives import x"),
        (("members", "a"), "from fisherkern.fisher import x"),
        (("members", "a"), "from fisherkern.merging import x"),
        (("merging", "a"), "from fisherkern.alignment import x"),
        (("merging", "files", "a"), "from fisherkern.postmerge import x"),
        (("alignment", "a"), "from fisherkern.merging import x"),
        (("encoders", "a"), "from fisherkern.members.symmetries import x"),
        (("merging", "a"), "from fisherkern import load"),
        (("files",), "from fisherkern.data import x"),
        (("errors",), "from fisherkern.files import x"),
        (("plots",), "import fisherkern"),
        (("training", "a"), "import fisherkern.cli"),
        (("cli", "a"), "from benchmarks.experiments import x"),
        (("demo",), "import benchmarks"),
        (("fisher", "a"), "from fisherkern.demo import x"),
    ],
)
def test_a_wrong_arrow_is_seen(module, source):
    assert len(wrong_arrows(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (("ops", "a"), "from fisherkern.errors import x\nfrom fisherkern.ops.b import y"),
        (("objectives", "a"), "from fisherkern.encoders import x"),
        (("training", "a"), "from . import loop\nfrom ..data import x"),
        (("cli",), "import fisherkern as fk\nfrom fisherkern.demo import x"),
        (("__main__",), "from fisherkern.cli import main"),
        (("__init__",), "from fisherkern.fisher import diag_fisher\nimport numpy"),
    ],
)
def test_a_right_arrow_passes(module, source):
    assert wrong_arrows(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        "from torch import nn",
        "import torch.nn as nn",
        "from torch.nn import Module",
        "import torch\nclass A(torch.nn.Module): ...",
        "from torch.nn.utils import parametrize",
    ],
)
def test_a_module_in_ops_is_seen(source):
    assert nn_uses(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch.nn.functional as F",
        "from torch.nn import functional as F",
        "import torch\ntorch.nn.functional.relu(x)",
    ],
)
def test_functional_is_no_module(source):
    assert nn_uses(source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "f(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "pd.read_pickle(path)",
    ],
)
def test_pickle_is_seen(source):
    assert pickle_uses(source) == [1]


def test_a_long_function_is_seen():
    body = "    x = 1\n"
    assert long_functions("def f():\n" + body * MAX_FUNCTION) == ["f has 61 lines"]
    assert long_functions("def f():\n" + body * (MAX_FUNCTION - 1)) == []
    docstring = '    """Says much.\n\n    And more.\n    """\n'
    assert long_functions("def f():\n" + docstring + body * (MAX_FUNCTION - 1)) == []
    assert long_functions("def f():\n" + docstring + body * MAX_FUNCTION) == ["f has 61 lines"]
    assert long_functions("@triton.jit\ndef f():\n" + body * (MAX_KERNEL - 1)) == []
    assert long_functions("@triton.jit\ndef f():\n" + body * MAX_KERNEL) == ["f has 101 lines"]


def test_no_large_file_is_tracked() -> None:
    """A wheel or a checkpoint that lay in the checkout would be in every clone for good."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    large = [path.name for path in paths if path.is_file() and path.stat().st_size > 4 << 20]
    assert large == []
