"""How modules of the lower rooms import one another, lazy imports included."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fisherkern"


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, wherever it does: modules, and names in them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def graph(room: str) -> dict[str, set[str]]:
    """The modules of a room, each with those of the room that it imports."""
    files = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in (PACKAGE / room).rglob("*.py")
        if path.name != "__init__.py"
    }
    return {name: imports(path) & (files.keys() - {name}) for name, path in files.items()}


@pytest.mark.parametrize("room", ["ops", "fisher"])
def test_no_two_modules_import_each_other(room: str) -> None:
    order = list(graphlib.TopologicalSorter(graph(room)).static_order())
    assert len(order) > 15


def test_the_fisher_knows_no_encoder() -> None:
    found = {
        path.name: names
        for path in (PACKAGE / "fisher").rglob("*.py")
        if (names := {n for n in imports(path) if n.startswith("fisherkern.encoders")})
    }
    assert found == {}


def test_importing_the_package_loads_little_beside_torch() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fisherkern;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=PACKAGE.parent)
    ours = {"fisherkern", "narwhals", "numpy", "safetensors", "torch", "tqdm"}
    assert set(loaded.split()) - sys.stdlib_module_names - ours == set()
