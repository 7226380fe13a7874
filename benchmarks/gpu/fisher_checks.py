"""Units `fisher:SAMPLER:BACKEND`: diag_fisher of a small model against float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

import fisherkern as fk
from gpu.checks import Share, report
from gpu.day import Day

SAMPLERS = ("exact", "topk", "model", "sketch", "random", "target")
BACKENDS = ("torch", "triton", "cuda")
ALLOWED = 1e-3  # of a tensor's norm


def check(day: Day, unit: str, sampler: str, backend: str) -> None:
    items, length, n, dim = (40, 5, 3, 8) if day.dry else (500, 20, 16, 32)
    about = {"unit": unit, "op": "diag_fisher", "backend": backend, "dtype": "float32"}
    about |= {"D": dim, "N": n, "V": items}
    report(day, about, lambda: _shares(day, sampler, backend, items, length, n, dim))


def _shares(
    day: Day, sampler: str, backend: str, items: int, length: int, n: int, dim: int
) -> Iterator[Share]:
    """The worst parameter, and whether all are there and a second call gives the same bits."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = fk.BERT4Rec(items, max_len=length, dim=dim).eval()
    history = torch.randint(1, items + 1, (n, length), generator=g)
    batch = {"history": history, "target": torch.randint(1, items + 1, (n,), generator=g)}
    given = {"sampler": sampler, "progress": False}
    if sampler not in ("exact", "sketch", "target"):
        given["k"] = 10
    exact = fk.diag_fisher(copy.deepcopy(model).double(), [batch], backend="torch", **given)
    model = model.to(day.device)
    batch = {name: tensor.to(day.device) for name, tensor in batch.items()}
    found = fk.diag_fisher(model, [batch], backend=backend, **given)
    # The Fisher of keys' biases is exactly 0: what is left of it is rounding.
    errors = {
        name: float((found[name].cpu().double() - value).norm() / value.norm()) / ALLOWED
        for name, value in exact.items()
        if not name.endswith("key.bias")
    }
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else 1e30)
    yield f"{sampler}: {worst}", errors[worst]
    again = fk.diag_fisher(model, [batch], backend=backend, **given)
    same = all(torch.equal(again[name], found[name]) for name in exact)
    yield f"{sampler}: the same bits again", 0.0 if same else float("inf")
