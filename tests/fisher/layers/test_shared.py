"""Tensors that all sequences share, computed from parameters and used as parameters are."""

from __future__ import annotations

import logging
from collections.abc import Callable

import brute
import pytest
import torch
import torch.nn.functional as F
from helpers.fisher import assert_equal
from helpers.layers import SIZES, Recommender, assert_right
from models import HISTORIES, NUM_ITEMS, shaken
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import fisherkern as fk
from fisherkern.adapters.parameters import Parameters
from fisherkern.fisher.forward.shared_tensors import SharedTensor

ROWS, WIDTH, LENGTH = NUM_ITEMS + 1, 4, 5


def looked_up_whole(table: Tensor, padding: int | None) -> Tensor:
    return F.embedding(torch.arange(len(table)), table, padding_idx=padding)


def masked(table: Tensor) -> Tensor:
    return table * (torch.arange(len(table)) != 0)[:, None]


TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "looked up whole": lambda w: looked_up_whole(w, None),
    "with a padding row": lambda w: looked_up_whole(w, 0),
    "RecTools": lambda w: F.dropout(torch.stack([looked_up_whole(w, 0)]).sum(0), 0.5, False) * 1.0,
    "scaled": lambda w: w * 2.0,
    "masked": masked,
    "rows in another order": lambda w: w.flip(0),
    "transposed twice": lambda w: w.t().contiguous().t() * 1.0,
    "rows after zeros": lambda w: torch.cat([torch.zeros(1, WIDTH), w[1:]]),
    "a row twice": lambda w: torch.cat([w[:-1], w[:1]]),
    "unit rows": lambda w: F.normalize(w, dim=1),
    "two tables in one": lambda w: torch.cat([w[:5] * 3, w[5:].flip(1)]),
}


class TableModel(nn.Module):
    """Rows of a computed table in, its product with the state out."""

    def __init__(self, table: str, lookup: str, tied: bool) -> None:
        super().__init__()
        self.kind, self.lookup = table, lookup
        self.items = nn.Parameter(torch.zeros(ROWS, WIDTH))
        self.other = None if tied else nn.Parameter(torch.zeros(ROWS, WIDTH))
        self.mix = nn.Linear(WIDTH, WIDTH)

    def encode(self, history: Tensor) -> Tensor:
        table = TABLES[self.kind](self.items)
        if self.lookup == "index":
            x = table[history]
        elif self.lookup == "select":
            x = table.index_select(0, history.reshape(-1)).view(*history.shape, WIDTH)
        else:
            x = F.embedding(history, table)
        return torch.tanh(self.mix(x)).sum(1)

    def head(self) -> tuple[Tensor, None]:
        return (self.items if self.other is None else self.other), None

    def forward(self, history: Tensor) -> Tensor:
        weight = self.items if self.other is None else self.other
        return self.encode(history) @ TABLES[self.kind](weight).T


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("table", TABLES)
def test_a_computed_table(table: str, tied: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(TableModel(table, "index", tied), caplog)


@pytest.mark.parametrize("lookup", ["select", "embedding"])
@pytest.mark.parametrize("size", SIZES)
def test_lookups_of_a_computed_table(
    lookup: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = TableModel("with a padding row", lookup, True)
    assert_right(model, caplog, history=HISTORIES[:size])


class Factored(TableModel):
    """The output weight as it is."""

    def forward(self, history: Tensor) -> Tensor:
        return self.encode(history) @ self.head()[0].T


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("table", ["with a padding row", "RecTools", "rows in another order"])
@pytest.mark.parametrize("sampler", ["exact", "topk"])
def test_a_computed_table_on_the_fast_path(
    table: str, tied: bool, sampler: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A row without a gradient in the lookup has one in the output layer, which is the weight."""
    model = shaken(Factored(table, "index", tied))
    p, gradients = brute.all_gradients(model, HISTORIES)
    subject = fk.adapt(model, encode=lambda m, h: m.encode(h), head=lambda m: m.head())
    with caplog.at_level(logging.WARNING, logger="fisherkern"):
        fisher = fk.diag_fisher(subject, [HISTORIES], sampler=sampler, k=ROWS, progress=False)
    assert fisher.meta["probes"] == WIDTH
    assert_equal(fisher, brute.fisher(gradients, p))
    assert not caplog.records


def time(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


POSITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "looked up": lambda p, x: F.embedding(time(x), p),
    "looked up, leading": lambda p, x: F.embedding(time(x)[None], p),
    "unsqueezed": lambda p, x: F.embedding(time(x), p).unsqueeze(0),
    "with None": lambda p, x: F.embedding(time(x), p)[None],
    "padding row": lambda p, x: F.embedding(time(x), p, padding_idx=1),
    "indexed": lambda p, x: p[time(x)],
    "repeated": lambda p, x: p[: x.shape[1]][None].repeat(len(x), 1, 1),
    "expanded": lambda p, x: p[None, : x.shape[1]].expand(len(x), -1, -1),
    "expanded as": lambda p, x: p[: x.shape[1]].expand_as(x),
    "broadcast": lambda p, x: torch.broadcast_to(p[: x.shape[1]], x.shape),
    "tiled": lambda p, x: torch.tile(p[: x.shape[1]], (len(x), 1, 1)),
    "sliced": lambda p, x: p[: x.shape[1]],
    "reversed": lambda p, x: F.embedding(time(x).flip(0), p),
    "from the end": lambda p, x: p.flip(0)[: x.shape[1]],
    "twice": lambda p, x: F.embedding(time(x) % 3, p),
    "scaled": lambda p, x: F.embedding(time(x), p) * 0.5,
    "of every sequence": lambda p, x: F.embedding(time(x).expand(len(x), -1), p),
    "computed": lambda p, x: torch.sin(p[: x.shape[1]]),
    "normed": lambda p, x: F.layer_norm(p[: x.shape[1]], (WIDTH,)),
}


class Positions(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.position = nn.Parameter(torch.zeros(LENGTH + 2, WIDTH))
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        return torch.tanh(self.mix(torch.tanh(x + POSITIONS[self.how](self.position, x)))).sum(1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", POSITIONS)
def test_positions(how: str, size: int, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(Positions(how)), caplog, history=HISTORIES[:size])


HEADS, BUCKETS = 2, 6


def distance(x: Tensor) -> Tensor:
    return (time(x)[:, None] - time(x)[None]).clamp(-3, 2) + 3


def t5_bias(p: nn.ParameterDict, x: Tensor, history: Tensor) -> Tensor:
    return F.embedding(distance(x), p["relative"]).permute(2, 0, 1).unsqueeze(0)


def time_buckets(p: nn.ParameterDict, x: Tensor, history: Tensor) -> Tensor:
    """HSTU's: the table of bucket ids that every sequence has of its own."""
    gaps = (history[:, :, None] - history[:, None]).abs() % BUCKETS
    bias = torch.index_select(p["time"], 0, gaps.view(-1)).view(len(x), *gaps.shape[1:])
    return bias[:, None]


def hstu_relative(p: nn.ParameterDict, x: Tensor, history: Tensor) -> Tensor:
    """HSTU's by relative position: padded, repeated, cut and sliced."""
    n = x.shape[1]
    t = F.pad(p["line"][: 2 * n - 1], [0, n]).repeat(n)
    t = t[..., :-n].reshape(1, n, 3 * n - 2)
    r = (2 * n - 1) // 2
    return t[:, :, r:-r][:, None]


BIASES = {
    "T5": t5_bias,
    "time buckets": time_buckets,
    "HSTU by position": hstu_relative,
    "HSTU by both": lambda p, x, h: hstu_relative(p, x, h) + time_buckets(p, x, h),
    "T5 repeated": lambda p, x, h: t5_bias(p, x, h).expand(len(x), -1, -1, -1),
    "time by index": lambda p, x, h: p["time"][h[:, None] % BUCKETS][:, None],
}
USED = {
    "T5": ["relative"],
    "time buckets": ["time"],
    "HSTU by position": ["line"],
    "HSTU by both": ["time", "line"],
    "T5 repeated": ["relative"],
    "time by index": ["time"],
}


class BiasedAttention(nn.Module):
    """Attention over scores with a learned bias, in three spellings, in two layers."""

    def __init__(self, bias: str, how: str) -> None:
        super().__init__()
        shapes = {"relative": (BUCKETS, HEADS), "time": (BUCKETS,), "line": (2 * LENGTH - 1,)}
        self.tables = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shapes[name])) for name in USED[bias]}
        )
        self.bias, self.how = bias, how
        self.projection = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.whole = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        bias = BIASES[self.bias](self.tables, x, history)
        if self.how == "module":
            mask = bias[0].expand(HEADS, -1, -1).repeat(len(x), 1, 1)
            x = x + self.whole(x, x, x, attn_mask=mask, need_weights=False)[0]
        for projection in self.projection:
            q, k, v = (
                part.unflatten(2, (HEADS, -1)).transpose(1, 2)
                for part in projection(x).chunk(3, dim=2)
            )
            if self.how == "fused":
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            elif self.how == "in place":
                scores = q @ k.transpose(2, 3)
                scores += bias
                y = scores.softmax(-1) @ v
            else:
                y = (q @ k.transpose(2, 3) + bias).softmax(-1) @ v
            x = x + y.transpose(1, 2).flatten(2)
        return torch.tanh(x).sum(1)


@pytest.mark.parametrize("how", ["added", "in place", "fused"])
@pytest.mark.parametrize("bias", BIASES)
def test_biases_of_attention(bias: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Recommender(BiasedAttention(bias, how))
    del model.body.whole
    for size in (5, 2, 1):
        caplog.clear()
        assert_right(model, caplog, history=HISTORIES[:size])


class Tower(nn.Module):
    """Items whose vectors a small network makes of their features, the output layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.linspace(-1, 1, ROWS * 3).view(ROWS, 3))
        self.first, self.norm = nn.Linear(3, 6), nn.LayerNorm(6)
        self.second = nn.Linear(6, WIDTH, bias=False)

    def forward(self, history: Tensor) -> Tensor:
        table = self.second(torch.tanh(self.norm(self.first(self.features))))
        return F.linear(torch.tanh(table[history]).sum(1), table)


@pytest.mark.parametrize("size", [5, 1])
def test_a_table_of_many_parameters_falls_back(size: int, caplog: pytest.LogCaptureFixture) -> None:
    names = ["first.weight", "first.bias", "norm.weight", "norm.bias", "second.weight"]
    assert_right(Tower(), caplog, fallback=names, history=HISTORIES[:size])


class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        return torch.tanh(self.mix(x)).sum(1) * self.scale.exp()


@pytest.mark.parametrize("size", SIZES)
def test_weight_norm_and_a_logarithmic_scale(size: int, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(WeightNorm()), caplog, history=HISTORIES[:size])


def test_one_table_in_two_shapes(caplog: pytest.LogCaptureFixture) -> None:
    """Rows of it and a view of it: entries that two uses know by other names."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.zeros(LENGTH + 2, WIDTH))

        def forward(self, x: Tensor, history: Tensor) -> Tensor:
            x = x + self.position[: x.shape[1]]
            return torch.tanh(x + F.embedding(time(x), self.position)).sum(1)

    assert_right(Recommender(Both()), caplog, fallback=["body.position"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1.37])
def test_entries_are_found_in_every_type(dtype: torch.dtype, scale: float) -> None:
    """Of a table with more entries than narrow types can count, rows in any order."""
    table = nn.Parameter(torch.randn(613, 11).to(dtype))
    order = torch.randperm(613, generator=torch.Generator().manual_seed(0))[:400]
    shared = F.embedding(order, table, padding_idx=int(order[7])) * scale
    module = nn.ParameterList([table])
    tensor = SharedTensor("S", get_gradient_edge(shared), shared, Parameters(module), {})
    entries = tensor.entries("0")
    assert entries is not None and entries.once
    expected = order[:, None] * 11 + torch.arange(11)
    passes = torch.arange(400) != 7
    assert torch.equal(entries.index.view(400, 11)[passes], expected[passes])
    assert torch.equal(entries.weight.view(400, 11)[:, 0] != 0, passes)
    rows = entries.rows(400, (613, 11))
    if scale == 1:
        assert rows is not None and torch.equal(rows, order.masked_fill(~passes, -1))
    else:
        assert rows is None


@pytest.mark.parametrize("function", [torch.sin, torch.square, lambda x: x + 0.1 * x.flip(0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_functions_are_no_entries(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    table = nn.Parameter(torch.randn(40, 8).to(dtype))
    shared = function(F.embedding(torch.arange(40), table))
    parameters = Parameters(nn.ParameterList([table]))
    tensor = SharedTensor("S", get_gradient_edge(shared), shared, parameters, {})
    found = tensor.entries("0")
    # The derivative of sin and of a square is a number for each entry: entries, if not rows.
    single = function in (torch.sin, torch.square)
    assert (found is not None) == single
    assert found is None or found.rows(40, (40, 8)) is None
