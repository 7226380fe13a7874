"""A model of another library as the table needs it: with its batches, and logits by hand."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fisherkern as fk

NUM_ITEMS = 40
# The longest history that the small models take.
MAX_LEN = 8
WIDTH = 8

Histories = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Member:
    """A model of a library.

    Args:
        model: as its user has it: a module, a wrapper, a Lightning module, a RecTools model.
        module: the bare network, which names the parameters.
        batches: native batches, as the library's loader or collator makes them.
        logits: (module, batch) -> (N, columns), by hand from the library's documentation.
        columns: the logit columns of the model's items 1, 2, ....
        make_batch: histories of item numbers 1, 2, ... -> a native batch; None where the
            package refuses to make one.
        takes_users: whether `make_batch` takes the users' numbers 0, 1, ... as well.
        targets: the next items of all batches as logit columns; None where batches have none.
        item_ids: what the model itself calls its items 1, 2, ...; None where it does not say.
        more_batches: native batches of other kinds, by name, that the same logits serve.
    """

    model: Any
    module: nn.Module
    batches: list[Any]
    logits: Callable[[nn.Module, Any], Tensor]
    columns: Tensor
    make_batch: Callable[..., Any] | None = None
    takes_users: bool = False
    targets: Tensor | None = None
    item_ids: list[str] | None = None
    more_batches: dict[str, list[Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A line of the table: `build(seed)` gives a member; two seeds give two to merge.

    `tolerance` is what the model's own arithmetic allows: 1e-9, or 1e-5 where it computes in
    float32 whatever its parameters are.
    """

    name: str
    build: Callable[[int], Member]
    library: str
    tolerance: float = 1e-9


ARCHITECTURES: dict[str, Architecture] = {}


def architecture(
    name: str, library: str, tolerance: float = 1e-9
) -> Callable[[Callable[[int], Member]], Callable[[int], Member]]:
    """Enter a builder into the table; `library` is the module that it imports, or "torch"."""

    def enter(build: Callable[[int], Member]) -> Callable[[int], Member]:
        ARCHITECTURES[name] = Architecture(name, build, library, tolerance)
        return build

    return enter


def histories() -> list[list[int]]:
    """Ten users' items 1 to NUM_ITEMS, oldest first, every item once and some again."""
    draw = random.Random(5)
    items = list(range(1, NUM_ITEMS + 1))
    draw.shuffle(items)
    users = [items[i::10] + draw.choices(items, k=2 + i % 4) for i in range(10)]
    # The same item twice in the part of a history that models see.
    users[3][-2] = users[3][-4]
    return users


def padded(
    histories: Histories, length: int, padding: int = 0, shift: int = 0, side: str = "left"
) -> Tensor:
    """The last `length` items of each history as (N, length) int64."""
    rows = torch.full((len(histories), length), padding)
    for row, history in zip(rows, histories, strict=True):
        recent = torch.tensor(list(history)[-length:]) + shift
        if side == "left":
            row[length - len(recent) :] = recent
        else:
            row[: len(recent)] = recent
    return rows


def dataset(item_ids: list[str] | None = None) -> fk.SequenceDataset:
    """The same users for `evaluate`: item number i is the model's i-th item.

    Where the model names its items the data set has them in the opposite order, so that it is
    the model's item V + 1 − i.
    """
    users = histories()
    ends = torch.tensor([0, *map(len, users)]).cumsum(0)
    flat = [item for user in users for item in user]
    item_ids = item_ids[::-1] if item_ids else [str(i) for i in range(1, NUM_ITEMS + 1)]
    user_ids = [str(i) for i in range(len(users))]
    return fk.SequenceDataset("libraries", flat, ends.numpy(), item_ids, user_ids)


def shaken(module: nn.Module, seed: int) -> nn.Module:
    """Move every parameter, so that none is 0 or 1 as it was initialised; eval mode, float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise.to(parameter.dtype))
    return module.double().eval()


def build_all() -> dict[str, Architecture]:
    """Every architecture; a library that is missing is noticed when its builder runs."""
    from benchmarks.libraries import (  # noqa: F401
        hugging_face_models,
        recbole_models,
        rectools_models,
        replay_models,
        single_file_models,
        wrapped_models,
    )

    return ARCHITECTURES
