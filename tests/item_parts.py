"""Items made of parts, in small, that several tests share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from models import NUM_ITEMS, shaken

import fisherkern as fk

ITEM_IDS = [f"i{v}" for v in range(1, NUM_ITEMS + 1)]
DATA = SimpleNamespace(item_ids=ITEM_IDS, attributes=None)
# Item i6 and others have none; i9 has two on the way down.
PATHS = {
    "i1": ["a", "b"],
    "i2": ["a", "c"],
    "i3": ["a", "b", "d"],
    "i5": ["e"],
    "i7": ["e", "f"],
    "i9": ["a", "c"],
    "i10": ["a"],
}


def array(width: int, seed: int, missing: tuple[int, ...]) -> np.ndarray:
    """Content of every item but the missing."""
    values = np.random.default_rng(seed).normal(size=(NUM_ITEMS, width))
    values[list(missing)] = np.nan
    return values


CONTENT = {"text": array(4, 0, (0, 4, 7)), "image": array(3, 1, (5, 7))}
PARTS = {
    "categories": fk.ItemParts.of(DATA, categories=PATHS),
    "hierarchy": fk.ItemParts.of(DATA, categories=PATHS, hierarchy=True, cold=["i9", "i4"]),
    "content": fk.ItemParts.of(DATA, categories={}, content={"text": CONTENT["text"]}),
    # i8 is cold and has nothing.
    "all": fk.ItemParts.of(
        DATA, categories=PATHS, hierarchy=True, content=CONTENT, cold=["i9", "i8", "i4"]
    ),
}
SIZES: dict[str, dict[str, Any]] = {
    "SASRec": {},
    "GRU4Rec": {"hidden_dim": 4},
    "Caser": {"window": 3, "horizontal": 3, "vertical": 2},
    "BERT4Rec": {"heads": 2},
    "FISM": {},
    "YouTubeDNN": {"hidden_dim": 5},
}


def encoder(name: str, parts: fk.ItemParts, num_items: int = NUM_ITEMS, **changes: Any) -> Any:
    """A float64 encoder of items made of parts, every parameter random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = getattr(fk, name)
        settings = {"max_len": 5, "dim": 6, **SIZES[name], "items": parts, **changes}
        return shaken(kind(num_items, **settings))


def item_part_objectives() -> ModuleType:
    """The example of that name, loaded once."""
    name = "item_part_objectives"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        # Data classes look their module up while they are made.
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
