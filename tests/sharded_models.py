"""Models whose item tables have their rows over processes, and what is asked of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import NUM_ITEMS, Foreign, shaken
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fisherkern as fk

WIDTH = 6
SAMPLERS: list[dict[str, Any]] = [
    {"sampler": "exact"},
    {"sampler": "exact", "tol": 0.1},
    {"sampler": "sketch", "probes": 3},
    {"sampler": "topk", "k": 4},
    {"sampler": "model", "k": 3, "chunk": 2},
    {"sampler": "model", "k": 3, "replacement": False},
    {"sampler": "random", "k": 3},
    {"sampler": "target"},
]
POSITIONS: list[dict[str, Any]] = [
    {"sampler": "model", "k": 3, "positions": "all"},
    {"sampler": "topk", "k": 3, "positions": 2},
    {"sampler": "exact", "positions": "all"},
]
FEW = [SAMPLERS[0], SAMPLERS[3]]


def sasrec(items: int = NUM_ITEMS, scale: float = 0.3, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"bias": True, **settings}
    return shaken(fk.SASRec(items, max_len=6, dim=WIDTH, heads=2, layers=1, **settings), 0, scale)


def gru4rec() -> nn.Module:
    torch.manual_seed(0)
    return shaken(fk.GRU4Rec(NUM_ITEMS, max_len=6, dim=WIDTH, tied=False))


def bert4rec() -> nn.Module:
    torch.manual_seed(0)
    return shaken(fk.BERT4Rec(NUM_ITEMS, max_len=6, dim=WIDTH, heads=2, layers=1))


def foreign(tie: str) -> nn.Module:
    torch.manual_seed(0)
    return shaken(Foreign(tie))


# By name: the model, the samplers, and its widest history.
CASES: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Any]]]] = {
    "tied with a bias": (sasrec, SAMPLERS + POSITIONS),
    "tied": (lambda: sasrec(bias=False), FEW),
    "untied with a bias": (lambda: sasrec(tied=False), [*SAMPLERS[2:6], POSITIONS[0]]),
    "untied": (lambda: sasrec(tied=False, bias=False), FEW),
    "saturated": (lambda: sasrec(scale=4.0), [SAMPLERS[0], *SAMPLERS[2:5]]),
    "fewer rows than processes want": (lambda: sasrec(items=4), FEW),
    "GRU4Rec": (gru4rec, FEW),
    "BERT4Rec": (bert4rec, FEW),
    "a foreign model, tied by a product": (lambda: foreign("matmul"), FEW),
    "a foreign model, tied by a module": (lambda: foreign("module"), FEW),
    "a foreign model, not tied": (lambda: foreign("none"), FEW),
}
# Fewer for 4 processes: what a shard without rows or items may change.
OF_FOUR = ("tied with a bias", "untied", "saturated", "fewer rows than processes want")


def batches(items: int = NUM_ITEMS, width: int = 6) -> list[dict[str, Tensor]]:
    """7, 1 and 5 histories with their next items, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for size in (7, 1, 5):
        ids = torch.randint(1, items + 1, (size, width), generator=generator)
        paddings = torch.randint(0, width - 1, (size,), generator=generator)
        for row, padding in zip(ids, paddings, strict=True):
            row[:padding] = 0
        target = torch.randint(1, items + 1, (size,), generator=generator)
        found.append({"history": ids, "target": target})
    return found


def sharded(model: nn.Module, mesh: Any) -> nn.Module:
    """The model with the tables of its items by rows over a mesh."""
    tables = {"items.weight", "decoder.weight", "decoder.bias"}
    tables |= {"item_embedding.weight", "output_embedding", "output_bias"}
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name not in tables:
            continue
        holder, _, leaf = name.rpartition(".")
        if id(parameter) not in made:
            rows = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            made[id(parameter)] = nn.Parameter(rows)
        setattr(model.get_submodule(holder), leaf, made[id(parameter)])
    return model


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loader_of(model: nn.Module) -> list[Any]:
    if isinstance(model, Foreign):
        return [batch["history"] for batch in batches(width=5)]
    return batches(model.num_items)


@contextlib.contextmanager
def refused(sentence: str) -> Iterator[None]:
    with pytest.raises(fk.InputError, match=sentence) as caught:
        yield
    assert "\n" not in str(caught.value)
