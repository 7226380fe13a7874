"""Other ways to the same numbers, one entry each, that bench_fisher.py times beside ours."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable

import torch

import fisherkern as fk
from benchmarks.rivals import autograd, hooks, operators
from benchmarks.rivals.port import Run


@dataclasses.dataclass(frozen=True)
class Rival:
    """A library's estimate: `prepare(model)` gives `run(history, k)`, which is what is timed.

    sampler: the estimate of ours that has the same value ("topk"), or the same expectation
    ("exact", where k counts matrix-vector products). module: what it imports; package: its
    name and release on PyPI; None where PyTorch alone does it.
    """

    name: str
    sampler: str
    prepare: Callable[[fk.BERT4Rec], Run]
    module: str | None = None
    package: str | None = None

    def version(self) -> str:
        return importlib.metadata.version(self.package) if self.package else torch.__version__

    def missing(self) -> str | None:
        """Why it cannot be imported, or None."""
        if self.module is None:
            return None
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return f"{error}; pip install -e '.[rivals]'"
        return None


RIVALS = (
    Rival("naive loop", "topk", autograd.naive),
    Rival("torch.func vmap(grad)", "topk", autograd.vmap_grad),
    Rival("Opacus", "topk", hooks.opacus, "opacus", "opacus"),
    Rival("BackPACK", "topk", hooks.backpack, "backpack", "backpack-for-pytorch"),
    Rival("ASDL", "topk", hooks.asdl, "asdl", "asdfghjkl"),
    Rival(
        "curvlinops Hutchinson",
        "exact",
        operators.hutchinson,
        "curvlinops",
        "curvlinops-for-pytorch",
    ),
    Rival("curvlinops XDiag", "exact", operators.xdiag, "curvlinops", "curvlinops-for-pytorch"),
)
