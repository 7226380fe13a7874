"""What tests of the Fisher share: batches with targets, a sampler's definition, a comparison."""

from __future__ import annotations

import brute
import torch
from models import HISTORIES, NUM_ITEMS
from torch import Tensor

import fisherkern as fk
from fisherkern.ops import counter_rng

TARGETS = torch.tensor([4, 11, 3, 6, 1])


def histories(length: int) -> Tensor:
    return HISTORIES if length > 1 else HISTORIES[:, -1:]


def loader(length: int) -> list[dict[str, Tensor]]:
    """Two batches of unequal size."""
    h = histories(length)
    return [
        {"history": h[:2], "target": TARGETS[:2]},
        {"history": h[2:], "target": TARGETS[2:]},
    ]


def omega_of(sampler: str, k: int, p: Tensor) -> Tensor:
    """The weights ω (N, V) that a sampler's definition gives, from the probabilities alone."""
    number = torch.arange(len(p))
    if sampler in ("exact", "sketch"):
        return p
    if sampler == "topk":
        top = p.topk(k, dim=1)
        return brute.counts(top.indices, top.values, NUM_ITEMS)
    if sampler == "target":
        ids = TARGETS[:, None] - 1
        return brute.counts(ids, p.gather(1, ids), NUM_ITEMS)
    u = counter_rng.uniform(7, number, torch.arange(k))
    if sampler == "model":
        ids = torch.searchsorted(p.cumsum(1), u, right=True)
        return brute.counts(ids, torch.full(ids.shape, 1 / k), NUM_ITEMS)
    ids = (u * NUM_ITEMS).long()
    return brute.counts(ids, p.gather(1, ids) * NUM_ITEMS / k, NUM_ITEMS)


def assert_equal(
    fisher: fk.DiagFisher, expected: dict[str, Tensor], tolerance: float = 1e-9
) -> None:
    """Relative error of every tensor; key biases, whose Fisher is exactly 0, against the scale."""
    assert set(fisher) == set(expected)
    scale = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        error = float((fisher[name] - value).norm())
        reference = scale if name.endswith("key.bias") else float(value.norm())
        assert error <= tolerance * reference, (name, error / reference)
