"""More pieces of generated models: what is odd, what goes around blocks, readings and heads."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fisher.generated_pieces import (
    ITEMS,
    LENGTH,
    WIDTH,
    Attention,
    Dense,
    Lookup,
    Norm,
    Recurrent,
    parameter,
)


class Odd(nn.Module):
    """A use of parameters that no layer class stands for."""

    KINDS = [
        "gate",
        "scalar_gate",
        "vector_scale",
        "dropout",
        "where",
        "assigned",
        "filled",
        "masked",
        "token",
        "mixture",
        "fourier",
        "prelu",
        "gaps",
        "item_bias",
        "hyper",
        "squeeze",
        "highway",
        "unbound",
        "cumulative",
        "outer",
        "deep_copy_row",
        "power",
    ]

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        kind = self.kind
        if kind in ("gate", "highway", "squeeze", "unbound"):
            self.layer = nn.Linear(WIDTH, WIDTH)
        if kind == "dropout":
            self.layer = nn.Dropout(0.5)
        shape = {
            "scalar_gate": (), "vector_scale": (WIDTH,), "where": (WIDTH,), "assigned": (WIDTH,),
            "filled": (), "masked": (WIDTH,), "token": (1, 1, WIDTH), "mixture": (2,),
            "fourier": (LENGTH // 2 + 1, WIDTH, 2), "prelu": (1,), "gaps": (3, WIDTH),
            "item_bias": (ITEMS + 1,), "hyper": (WIDTH, WIDTH * WIDTH), "cumulative": (WIDTH,),
            "outer": (WIDTH,), "deep_copy_row": (3, WIDTH), "power": (WIDTH,),
        }.get(kind)  # fmt: skip
        if shape is not None:
            self.extra = parameter(*shape)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        known = ids[:, -x.shape[1] :, None] > 2
        if self.kind in ("gate", "highway", "squeeze", "unbound", "dropout"):
            return self._by_layer(x)
        return self._by_parameter(x, known, ids[:, -x.shape[1] :])

    def _by_layer(self, x: Tensor) -> Tensor:
        if self.kind == "gate":
            return x * torch.sigmoid(self.layer(x))
        if self.kind == "highway":
            share = torch.sigmoid(self.layer(x))
            return share * torch.tanh(x) + (1 - share) * x
        if self.kind == "squeeze":
            return x * torch.sigmoid(self.layer(x.mean(1)))[:, None]
        if self.kind == "unbound":
            return torch.stack([self.layer(row) for row in x.unbind(1)], dim=1)
        return self.layer(x)

    def _by_parameter(self, x: Tensor, known: Tensor, ids: Tensor) -> Tensor:
        kind, extra, n = self.kind, self.extra, len(x)
        if kind in ("scalar_gate", "vector_scale", "cumulative"):
            return extra * (x.cumsum(1) if kind == "cumulative" else x)
        if kind == "where":
            return torch.where(known, x, extra)
        if kind == "assigned":
            x = x.clone()
            x[known.expand(-1, -1, 1)[..., 0]] = extra
            return x
        if kind == "filled":
            return x.masked_fill(known, 0.5) * extra
        if kind == "masked":
            return x * known + extra * ~known
        if kind == "token":
            joined = torch.cat([extra.expand(n, -1, -1), x], dim=1)
            return torch.tanh(joined + joined.mean(1, keepdim=True))[:, 1:]
        if kind == "mixture":
            share = extra.softmax(0)
            return share[0] * torch.tanh(x) + share[1] * x
        if kind == "fourier":
            length = x.shape[1]
            spectrum = torch.fft.rfft(x, dim=1, norm="ortho")
            filters = torch.view_as_complex(extra)[: spectrum.shape[1]]
            return torch.fft.irfft(spectrum * filters, n=length, dim=1, norm="ortho")
        if kind == "prelu":
            return F.prelu(x, extra)
        if kind == "gaps":
            return x + F.embedding(ids % 3, extra)
        if kind == "item_bias":
            return x * (1 + extra[ids])[..., None]
        if kind == "hyper":
            return torch.bmm(x, (x.mean(1) @ extra).view(n, WIDTH, WIDTH))
        if kind == "outer":
            return x + torch.einsum("ntd,d,e->nte", x, extra, extra)
        if kind == "deep_copy_row":
            return x + extra[1].clone() - extra[-1]
        return x * extra.abs().pow(1.5)


class Wrong(nn.Module):
    """What has no Fisher of a sequence: to be refused."""

    KINDS = ["batch_mean", "batch_norm", "random", "counting"]

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        if self.kind == "batch_norm":
            self.layer = nn.BatchNorm1d(WIDTH, track_running_stats=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.kind == "batch_mean":
            return x - 0.5 * x.mean(0)
        if self.kind == "batch_norm":
            return self.layer(x.transpose(1, 2)).transpose(1, 2)
        if self.kind == "random":
            return F.dropout(x, 0.3)
        self.calls += 1
        return x * (1 + self.calls / 50)


class Around(nn.Module):
    """A block with something around it."""

    KINDS = [
        "alone",
        "residual",
        "rezero",
        "checkpoint",
        "checkpoint_reentrant",
        "twice",
        "pre_norm",
    ]

    def __init__(self, rng: random.Random, block: nn.Module) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        self.block = block
        if self.kind == "rezero":
            self.alpha = parameter()
        if self.kind == "pre_norm":
            self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.kind == "residual":
            return x + self.block(x, ids)
        if self.kind == "rezero":
            return x + self.alpha * self.block(x, ids)
        if self.kind == "checkpoint":
            return x + checkpoint(self.block, x, ids, use_reentrant=False)
        if self.kind == "checkpoint_reentrant":
            return x + checkpoint(self.block, x, ids, use_reentrant=True)
        if self.kind == "twice":
            return self.block(torch.tanh(self.block(x, ids)), ids)
        if self.kind == "pre_norm":
            return x + self.block(self.norm(x), ids)
        return self.block(x, ids)


def block(rng: random.Random) -> nn.Module:
    """One block, as it is or with something around it."""
    kind = rng.choices([Dense, Odd, Norm, Attention, Recurrent, Wrong], [8, 7, 3, 4, 2, 0.3])[0]
    return Around(rng, kind(rng))


class Reading(nn.Module):
    """States (N, T, D) to one of each sequence, (N, D)."""

    KINDS = [
        "last",
        "mean",
        "masked_mean",
        "most",
        "summed",
        "first",
        "weighted",
        "place",
        "squeezed",
    ]

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        if self.kind == "weighted":
            self.query = parameter(WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.kind == "mean":
            return x.mean(dim=1)
        if self.kind == "masked_mean":
            known = (ids[:, -x.shape[1] :, None] > 0).to(x.dtype)
            return (x * known).sum(1) / known.sum(1).clamp(min=1)
        if self.kind == "most":
            return x.amax(dim=1)
        if self.kind == "summed":
            return x.sum(1)
        if self.kind == "first":
            return x.flip(1)[:, 0]
        if self.kind == "weighted":
            return ((x @ self.query).softmax(1)[..., None] * x).sum(1)
        if self.kind == "place":
            place = ((ids > 0).sum(1) - 1).clamp(min=0, max=x.shape[1] - 1)
            return x[torch.arange(len(x)), place]
        if self.kind == "squeezed":
            return x[:, -1:].squeeze(1)
        return x[:, -1]


class Head(nn.Module):
    """h (N, D) to logits, by a matrix of its own or the table of the lookup."""

    KINDS = [
        "own",
        "own_biased",
        "bare",
        "tied",
        "tied_items",
        "tied_biased",
        "tied_scaled",
        "tied_temperature",
        "tied_cosine",
        "tied_projected",
        "tied_einsum",
        "tied_sum",
        "tied_hidden",
        "tied_log",
        "cosine",
        "two",
        "bilinear",
        "masked",
        "joined",
    ]

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        if self.kind in ("own", "own_biased", "bare", "cosine", "two", "masked"):
            self.layer = nn.Linear(WIDTH, ITEMS, bias=self.kind == "own_biased")
        if self.kind in ("two", "tied_projected", "bilinear", "tied_hidden"):
            self.projection = nn.Linear(WIDTH, WIDTH)
        if self.kind in ("tied_biased", "tied_sum"):
            self.bias = parameter(ITEMS + 1)
        if self.kind == "tied_temperature":
            self.temperature = parameter()
        if self.kind == "joined":
            self.parts = nn.ModuleList([nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 4)])

    def parts_of(self, lookup: Lookup) -> tuple[Tensor, Tensor | None] | None:
        """W and b where logits = h Wᵀ + b with no more to it; None elsewhere."""
        if self.kind in ("own", "own_biased", "bare"):
            return self.layer.weight, self.layer.bias
        if self.kind == "tied":
            return lookup.table(), None
        if self.kind == "tied_items":
            return lookup.table()[1:], None
        if self.kind == "tied_biased":
            return lookup.table(), self.bias
        return None

    def forward(self, h: Tensor, lookup: Lookup) -> Tensor:
        if not self.kind.startswith("tied") and self.kind != "bilinear":
            return self._own(h)
        table = lookup.table()
        if self.kind == "tied_items":
            return h @ table[1:].T
        if self.kind == "tied_biased":
            return F.linear(h, table, self.bias)
        if self.kind == "tied_scaled":
            return h @ table.T / 3
        if self.kind == "tied_temperature":
            return F.linear(h, table) * self.temperature.exp()
        if self.kind == "tied_cosine":
            return F.normalize(h, dim=1) @ F.normalize(table, dim=1).T / 0.3
        if self.kind == "tied_projected":
            return self.projection(h) @ table.t()
        if self.kind == "bilinear":
            return h @ self.projection(table).T
        if self.kind == "tied_einsum":
            return torch.einsum("nd,vd->nv", h, table)
        if self.kind == "tied_sum":
            return (h[:, None] * table).sum(-1) + self.bias
        if self.kind == "tied_hidden":
            return F.linear(torch.tanh(self.projection(h)), table)
        if self.kind == "tied_log":
            return torch.log_softmax(h @ table.T, dim=-1)
        return torch.matmul(h, table.transpose(0, 1))

    def _own(self, h: Tensor) -> Tensor:
        if self.kind == "bare":
            return torch.matmul(h, self.layer.weight.T)
        if self.kind == "cosine":
            return F.linear(F.normalize(h, dim=1), F.normalize(self.layer.weight, dim=1)) * 4
        if self.kind == "two":
            return self.layer(h) + self.layer(torch.tanh(self.projection(h)))
        if self.kind == "masked":
            return self.layer(h).index_fill(1, torch.tensor([0]), -1e4)
        if self.kind == "joined":
            return torch.cat([part(h) for part in self.parts], dim=1)
        return self.layer(h)


class HandsOn(nn.Module):
    """A module around a model that does nothing but call it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
