"""Encoders of every kind with random weights, and random reparametrisations of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import HISTORIES, NUM_ITEMS, shaken
from torch import Tensor

from fisherkern.encoders import ENCODERS, Symmetries

Build = Callable[[int], Any]


def build(name: str, seed: int, **config: Any) -> Any:
    """A float64 encoder over 11 items, every weight, gain and bias random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = shaken(ENCODERS[name](NUM_ITEMS, max_len=5, **config), seed)
    with torch.no_grad():
        model.item_embedding.weight[0] = 0  # as the encoders keep it
    return model


def constant_gain(model: Any, norm: str) -> Any:
    """The model with one number, 1.7, as the gain of every channel of a layer norm."""
    with torch.no_grad():
        model.get_submodule(norm).weight.fill_(1.7)
    return model


BLOCKS = {"dim": 6, "layers": 2, "heads": 2, "inner_dim": 7}

CASES: dict[str, Build] = {
    f"BERT4Rec-{norm}-{'tied' if tied else 'untied'}": (
        lambda seed, norm=norm, tied=tied: build("BERT4Rec", seed, norm=norm, tied=tied, **BLOCKS)
    )
    for norm in ("post", "pre")
    for tied in (True, False)
}
CASES |= {
    f"SASRec-{norm}-{'tied' if tied else 'untied'}-{'bias' if bias else 'plain'}": (
        lambda seed, norm=norm, tied=tied, bias=bias: build(
            "SASRec", seed, norm=norm, tied=tied, bias=bias, **BLOCKS
        )
    )
    for norm, tied, bias in (
        ("post", True, False),
        ("post", False, True),
        ("pre", True, True),
        ("pre", False, True),
        ("pre", False, False),
    )
}
CASES |= {
    f"{name}-{'tied' if tied else 'untied'}": (
        lambda seed, name=name, tied=tied, config=config: build(name, seed, tied=tied, **config)
    )
    for name, config in (
        ("GRU4Rec", {"dim": 6, "layers": 2, "hidden_dim": 5}),
        ("Caser", {"dim": 6, "window": 3, "horizontal": 4, "vertical": 3}),
        ("FISM", {"dim": 6}),
        ("YouTubeDNN", {"dim": 6, "hidden_dim": 5}),
    )
    for tied in (True, False)
}
CASES["BERT4Rec-constant"] = lambda seed: constant_gain(
    CASES["BERT4Rec-pre-untied"](seed), "embedding_norm"
)
CASES["SASRec-constant"] = lambda seed: constant_gain(
    CASES["SASRec-pre-tied-bias"](seed), "final_norm"
)
CASES["SASRec-one-of-each"] = lambda seed: build(
    "SASRec", seed, dim=1, layers=1, heads=1, inner_dim=1
)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


def fixing_ones(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal Q with Q 1 = 1: turn 1 into an axis, rotate the others, turn back."""
    frame = torch.eye(size, dtype=torch.float64)
    frame[:, 0] = 1
    frame = torch.linalg.qr(frame)[0]
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = orthogonal(size - 1, generator)
    return frame @ inner @ frame.t()


def random_transforms(symmetries: Symmetries, seed: int) -> dict[str, Tensor]:
    """A random element of every group."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, group in symmetries.groups.items():
        size, labels = group.size, symmetries.labels(name)
        order = torch.randperm(size, generator=generator)
        if group.kind == "permutation":
            found |= dict.fromkeys(labels, order)
        elif group.kind == "signed":
            signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
            found |= dict.fromkeys(labels, order)
            found[labels[0]] = torch.diag(signs.double()) @ torch.eye(size).double()[order]
        elif group.kind == "orthogonal":
            found |= {label: orthogonal(size, generator) for label in labels}
        elif group.kind == "rotation":
            found |= {label: fixing_ones(size, generator) for label in labels}
        else:
            width = size // group.heads
            heads = torch.eye(group.heads).double()[
                torch.randperm(group.heads, generator=generator)
            ]
            for label in labels:
                within = [orthogonal(width, generator) for _ in range(group.heads)]
                moved = torch.kron(heads, torch.eye(width).double())
                found[label] = torch.block_diag(*within) @ moved
    return found


def logits(model: Any, histories: Tensor = HISTORIES) -> Tensor:
    with torch.no_grad():
        return model(histories)
