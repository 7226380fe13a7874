"""Products, choices, lookups and bags in the many ways that models write them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import SIZES, Recommender, assert_right
from models import HISTORIES, NUM_ITEMS
from torch import Tensor, nn

import fisherkern as fk

Body = Callable[[nn.ParameterDict, Tensor, Tensor], Tensor]
W = {"w": (4, 4)}


class Bare(nn.Module):
    """A body written as a function of bare parameters, states and ids."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], body: Body) -> None:
        super().__init__()
        self.parameter = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        )
        self.function = body

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        return self.function(self.parameter, torch.tanh(x), history)


def written(x: Tensor, index: object, row: Tensor) -> Tensor:
    x = x * 1
    x[index] = row
    return torch.tanh(x).sum(1)


def written_rows(x: Tensor, history: Tensor, row: Tensor) -> Tensor:
    rows = x.reshape(-1, 4) * 1
    rows[history.view(-1) == 0] = row
    return torch.tanh(rows.view(x.shape)).sum(1)


def added_to_rows(x: Tensor, row: Tensor) -> Tensor:
    rows = x.reshape(-1, 4) * 1
    rows += row
    return torch.tanh(rows.view(x.shape)).sum(1)


def last(history: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(history)), (history != 0).sum(1) - 1


BODIES: dict[str, tuple[dict[str, tuple[int, ...]], Body]] = {
    "einsum, vectors of a table": (
        W,
        lambda p, x, h: torch.einsum("btd,vd->btv", x, p["w"]).sum(1),
    ),
    "einsum, states": (W, lambda p, x, h: torch.einsum("bd,vd->bv", x.sum(1), p["w"])),
    "einsum, matrix": (W, lambda p, x, h: torch.einsum("bti,io->bto", [x, p["w"]]).sum(1)),
    "einsum, weight first": (W, lambda p, x, h: torch.einsum("vd,btd->bvt", p["w"], x).sum(2)),
    "einsum, dots": (W, lambda p, x, h: torch.einsum("...d,vd->...v", x, p["w"]).sum(1)),
    "einsum, heads": (
        {"w": (4, 2, 3), "o": (2, 3, 4)},
        lambda p, x, h: torch.einsum(
            "bthk,hkd->btd", torch.tanh(torch.einsum("btd,dhk->bthk", x, p["w"])), p["o"]
        ).sum(1),
    ),
    "einsum, along time": (
        {"w": (5, 3)},
        lambda p, x, h: torch.tanh(torch.einsum("btd,ts->bsd", x, p["w"])).sum(1),
    ),
    "einsum, two letters summed": (
        {"w": (4, 3, 5)},
        lambda p, x, h: torch.einsum("btd,odt->bo", x[..., :3], p["w"]),
    ),
    "einsum, a computed weight": (
        W,
        lambda p, x, h: torch.einsum("btd,vd->btv", x, p["w"].exp()).sum(1),
    ),
    "inner": (W, lambda p, x, h: torch.inner(x, p["w"]).sum(1)),
    "mm": (W, lambda p, x, h: torch.mm(x.sum(1), p["w"])),
    "mm of a transpose, flattened": (
        W,
        lambda p, x, h: torch.mm(x.reshape(-1, 4), p["w"].t()).view(x.shape).sum(1),
    ),
    "method mm": (W, lambda p, x, h: x.sum(1).mm(p["w"])),
    "matmul, flattened": (
        W,
        lambda p, x, h: torch.matmul(x.view(-1, 4), p["w"]).view(*h.shape, 4).sum(1),
    ),
    "linear of four dimensions": (
        {"w": (3, 2), "b": (3,)},
        lambda p, x, h: F.linear(x.view(*h.shape, 2, 2), p["w"], p["b"]).flatten(2).sum(1)[:, :4],
    ),
    "product on the left": ({"w": (3, 5)}, lambda p, x, h: torch.tanh(p["w"] @ x).sum(1)),
    "where": ({"r": (4,)}, lambda p, x, h: torch.where((h == 0)[..., None], p["r"], x).sum(1)),
    "where, of a state": (
        {"r": (1, 4)},
        lambda p, x, h: torch.where((h[:, :1] == 0), x.sum(1), p["r"]),
    ),
    "where, a method": ({"r": (4,)}, lambda p, x, h: x.where((h != 0)[..., None], p["r"]).sum(1)),
    "where, two rows": (
        {"r": (4,), "s": (5, 1)},
        lambda p, x, h: (x * torch.where((h == 0)[..., None], p["r"], p["s"])).sum(1),
    ),
    "assigned by a mask": ({"r": (4,)}, lambda p, x, h: written(x, h == 0, p["r"])),
    "assigned to a position": ({"r": (4,)}, lambda p, x, h: written(x, (slice(None), -1), p["r"])),
    "assigned by ids": ({"r": (1, 4)}, lambda p, x, h: written(x, last(h), p["r"])),
    "assigned, a table's row": ({"r": (3, 4)}, lambda p, x, h: written(x, h == 0, p["r"][1])),
    "a class token": (
        {"r": (1, 1, 4)},
        lambda p, x, h: torch.cat([p["r"].expand(len(x), -1, -1), x], 1).cumsum(1).tanh().sum(1),
    ),
    "index_select": (
        {"e": (3, 4)},
        lambda p, x, h: (x * p["e"].index_select(0, (h % 3).view(-1)).view(x.shape)).sum(1),
    ),
    "torch.index_select of states": (
        {"e": (3, 4)},
        lambda p, x, h: x.sum(1) * torch.index_select(p["e"], 0, h[:, -1] % 3),
    ),
    "a table of numbers": ({"e": (3,)}, lambda p, x, h: (x * p["e"][h % 3][..., None]).sum(1)),
    "a table of matrices": (
        {"e": (3, 2, 4)},
        lambda p, x, h: (x[:, :, None] * p["e"][h % 3]).sum((1, 2)),
    ),
    "added to rows in place": ({"r": (4,)}, lambda p, x, h: added_to_rows(x, p["r"])),
    "subtracted": ({"r": (4,)}, lambda p, x, h: torch.tanh(x - p["r"]).sum(1)),
    "subtracted from": ({"r": (4,)}, lambda p, x, h: torch.tanh(p["r"] - x).sum(1)),
    "added and subtracted": (
        {"r": (4,)},
        lambda p, x, h: torch.tanh(torch.tanh(x - p["r"]) + p["r"]).sum(1),
    ),
    "divided": ({"r": (4,)}, lambda p, x, h: torch.tanh(x / p["r"]).sum(1)),
    "divided by a computed scale": ({"r": ()}, lambda p, x, h: (x / p["r"].exp()).sum(1)),
}


@pytest.mark.parametrize("name", BODIES)
def test_spellings(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for size in SIZES:
        caplog.clear()
        assert_right(Recommender(Bare(*BODIES[name])), caplog, history=HISTORIES[:size])


UNSEEN: dict[str, tuple[dict[str, tuple[int, ...]], Body]] = {
    "assigned to flattened rows": ({"w": (4,)}, lambda p, x, h: written_rows(x, h, p["w"])),
    "einsum, a weight of each head": (
        {"w": (2, 2, 2)},
        lambda p, x, h: (
            torch.einsum("bthd,hde->bthe", x.unflatten(2, (2, 2)), p["w"]).flatten(2).sum(1)
        ),
    ),
    "a row for each position that is written": (
        {"w": (7, 4)},
        lambda p, x, h: written(x, h == 0, p["w"][: int((h == 0).sum())]),
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_falls_back(name: str, caplog: pytest.LogCaptureFixture) -> None:
    history = HISTORIES[:1] if "written" in name else HISTORIES
    body = Bare(*UNSEEN[name])
    assert_right(Recommender(body), caplog, fallback=["body.parameter.w"], history=history)


class Bags(nn.Module):
    """Bags of the items (tied to nothing), 2-D or flat with offsets, of sequences or positions."""

    def __init__(self, mode: str, flat: bool, weighted: bool, **kwargs: object) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(NUM_ITEMS + 1, 4, mode=mode, **kwargs)
        self.flat, self.weighted = flat, weighted

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        weights = torch.cos(history.to(x.dtype)) if self.weighted else None
        if not self.flat:
            return x.sum(1) + torch.tanh(self.bag(history, per_sample_weights=weights))
        kept = history != 0
        if weights is not None:
            weights = weights[kept]
        sizes = kept.sum(1)
        offsets = sizes.cumsum(0) - sizes
        if self.bag.include_last_offset:
            offsets = torch.cat([offsets, sizes.sum()[None]])
        return x.sum(1) + torch.tanh(self.bag(history[kept], offsets, weights))


@pytest.mark.parametrize("size", [5, 2, 1])
@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
@pytest.mark.parametrize(
    ("mode", "weighted", "kwargs"),
    [
        ("sum", False, {}),
        ("mean", False, {"padding_idx": 0}),
        ("mean", False, {"sparse": True}),
        ("sum", True, {"include_last_offset": True}),
    ],
)
def test_bags(
    mode: str,
    flat: bool,
    weighted: bool,
    kwargs: dict[str, object],
    size: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not flat:
        kwargs = {name: value for name, value in kwargs.items() if name != "include_last_offset"}
    model = Recommender(Bags(mode, flat, weighted, **kwargs))
    assert_right(model, caplog, history=HISTORIES[:size])


class BagsOfPositions(nn.Module):
    """Features of every item in a bag, as RecTools and RePlay have them."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, mode="mean")

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        features = torch.stack([history % 7, history % 3, history % 2], dim=2)
        return torch.tanh(x + self.bag(features.view(-1, 3)).view(x.shape)).sum(1)


@pytest.mark.parametrize("size", SIZES)
def test_bags_of_positions(size: int, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(BagsOfPositions()), caplog, history=HISTORIES[:size])


def test_sparse_gradients_of_the_fallback(caplog: pytest.LogCaptureFixture) -> None:
    """By a function without a handler, torch.embedding itself."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(NUM_ITEMS + 1, 4))

        def forward(self, x: Tensor, history: Tensor) -> Tensor:
            return torch.tanh(x + torch.embedding(self.table, history, sparse=True)).sum(1)

    assert_right(Recommender(Sparse()), caplog, fallback=["body.table"], history=HISTORIES[:3])
    settings = {"k": 3, "reduction": "batchwise", "progress": False}
    fisher = fk.diag_fisher(Recommender(Sparse()), [HISTORIES[:1]], **settings)
    assert fisher["body.table"].layout == torch.strided
