"""The pieces that generated models are put together from: lookups, positions, blocks, readings.

Everything is small and odd on purpose. A piece draws its own variant from the generator that it
is given, so that one seed fixes a whole model.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

WIDTH, LENGTH, ITEMS = 4, 4, 9


def parameter(*shape: int) -> nn.Parameter:
    """A parameter of normal numbers."""
    return nn.Parameter(torch.randn(shape) * 0.7)


class Lookup(nn.Module):
    """Ids (N, T) to vectors (N, T, D); `table` gives all of them, (V + 1, D)."""

    KINDS = [
        "plain",
        "padding",
        "scaled",
        "bare",
        "flat",
        "select",
        "one_hot",
        "computed",
        "normalised",
        "product",
        "factorised",
        "composed",
        "sparse",
        "bag",
        "added",
        "frozen",
    ]

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        padding = 0 if self.kind in ("padding", "bag") or rng.random() < 0.3 else None
        self.items = nn.Embedding(ITEMS + 1, WIDTH, padding, sparse=self.kind == "sparse")
        if self.kind == "frozen":
            self.items.requires_grad_(False)
        self.factor = parameter(WIDTH, WIDTH) if self.kind in ("product", "factorised") else None
        self.scale = parameter(WIDTH) if self.kind == "computed" else None
        self.group = nn.Embedding(3, WIDTH) if self.kind in ("composed", "added") else None
        self.bag = nn.EmbeddingBag(ITEMS + 1, WIDTH, mode=rng.choice(["sum", "mean"]))
        if self.kind == "bag":
            del self.items
        else:
            del self.bag

    def table(self) -> Tensor:
        weight: Tensor = self.items.weight if self.kind != "bag" else self.bag.weight
        if self.kind == "computed":
            return torch.tanh(weight * self.scale)
        if self.kind == "normalised":
            return F.normalize(weight, dim=-1)
        if self.kind == "product":
            return weight @ self.factor
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        kind, weight = self.kind, self.table()
        if kind == "scaled":
            return self.items(ids) * WIDTH**0.5
        if kind == "bare":
            return weight[ids]
        if kind == "flat":
            return F.embedding(ids.flatten(), weight).view(*ids.shape, WIDTH)
        if kind == "select":
            return weight.index_select(0, ids.reshape(-1)).reshape(*ids.shape, -1)
        if kind == "one_hot":
            return F.one_hot(ids, ITEMS + 1).to(weight.dtype) @ weight
        if kind in ("computed", "normalised", "product"):
            return F.embedding(ids, weight)
        if kind == "factorised":
            return self.items(ids) @ self.factor
        if kind == "composed":
            return self.items(ids // 2) + self.group(ids % 3)
        if kind == "added":
            return self.items(ids) + self.group(torch.full_like(ids, 1))
        if kind == "bag":
            return self.bag(ids)[:, None]
        return self.items(ids)


class Positions(nn.Module):
    """x (N, T, D) with something about the places put to it."""

    KINDS = [
        "none",
        "arange",
        "leading",
        "expanded",
        "repeated",
        "first_rows",
        "bare",
        "reversed",
        "counted",
        "buffer",
        "selected",
        "scaled",
        "joined",
        "time_first",
        "doubled",
    ]

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        self.places = nn.Embedding(LENGTH + 2, WIDTH)
        self.mix = nn.Linear(2 * WIDTH, WIDTH)
        self.bare = parameter(1, LENGTH + 2, WIDTH)
        self.register_buffer("sines", torch.sin(torch.arange(24.0).view(6, 4)))
        self.scale = parameter(1)
        used = {
            "arange": "places", "leading": "places", "expanded": "places", "repeated": "places",
            "first_rows": "places", "reversed": "places", "counted": "places", "joined": "mix",
            "selected": "places", "time_first": "places", "doubled": "places", "bare": "bare",
            "scaled": "scale",
        }.get(self.kind)  # fmt: skip
        for name in ("places", "mix", "bare", "scale"):
            if name != used and not (name == "places" and self.kind == "joined"):
                delattr(self, name)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        n, t = x.shape[:2]
        order = torch.arange(t)
        kind = self.kind
        if kind == "arange":
            return x + self.places(order)
        if kind == "leading":
            return x + self.places(order[None])
        if kind == "expanded":
            return x + self.places(order[None].expand(n, -1))
        if kind == "repeated":
            return x + self.places(order).repeat(n, 1, 1)
        if kind == "first_rows":
            return x + self.places.weight[:t]
        if kind == "bare":
            return x + self.bare[:, -t:]
        if kind == "reversed":
            return x + self.places(order.flip(0))
        if kind == "counted":
            count = (ids > 0).cumsum(1)[:, -t:] if ids.shape[1] >= t else order
            return x + self.places(count)
        if kind == "buffer":
            return x + self.sines[:t]
        if kind == "selected":
            return x + torch.index_select(self.places.weight, 0, order).unsqueeze(0)
        if kind == "scaled":
            return x + self.scale * self.sines[:t]
        if kind == "joined":
            return self.mix(torch.cat([x, self.places(order).expand(n, -1, -1)], dim=-1))
        if kind == "time_first":
            return (x.transpose(0, 1) + self.places(order)[:, None]).transpose(0, 1)
        if kind == "doubled":
            return x + self.places(order % 2) + self.places(order)
        return x


class Dense(nn.Module):
    """A product with a matrix, said in one of many ways, and an activation."""

    KINDS = [
        "linear",
        "bare_linear",
        "matmul",
        "matmul_bias",
        "einsum",
        "einsum_turned",
        "tensordot",
        "addmm",
        "bmm",
        "summed",
        "loop",
        "chunked",
        "conv1d",
        "conv_depth",
        "bilinear",
        "twice",
        "turned_back",
        "in_place",
        "time_first",
        "weight_norm",
        "old_weight_norm",
        "spectral",
        "orthogonal",
        "function",
        "vmapped",
        "frozen",
        "low_rank",
    ]
    ACTIVATIONS = (
        torch.tanh, F.relu, F.gelu, F.silu, F.elu, F.softplus, F.leaky_relu, torch.sigmoid,
        lambda x: x, lambda x: x.relu_(), lambda x: F.glu(torch.cat([x, x * 2], -1)),
    )  # fmt: skip

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        self.activation = rng.choice(self.ACTIVATIONS)
        kind, bias = self.kind, rng.random() < 0.7
        conv = {"conv1d": (3, 1), "conv_depth": (3, WIDTH)}
        if kind in conv:
            kernel, groups = conv[kind]
            self.layer: nn.Module = nn.Conv1d(WIDTH, WIDTH, kernel, padding=1, groups=groups)
        elif kind == "bilinear":
            self.layer = nn.Bilinear(WIDTH, WIDTH, WIDTH)
        else:
            self.layer = nn.Linear(WIDTH, WIDTH, bias=bias)
        changes: dict[str, Callable[[nn.Module], nn.Module]] = {
            "weight_norm": parametrizations.weight_norm,
            "old_weight_norm": nn.utils.weight_norm,
            "spectral": parametrizations.spectral_norm,
            "orthogonal": parametrizations.orthogonal,
            "frozen": lambda layer: layer.requires_grad_(False),
        }
        if kind in changes:
            self.layer = changes[kind](self.layer)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.activation(self._product(x))

    def _product(self, x: Tensor) -> Tensor:
        kind, layer = self.kind, self.layer
        if kind in ("conv1d", "conv_depth"):
            return layer(x.transpose(1, 2)).transpose(1, 2)
        if kind == "bilinear":
            return layer(x, x.flip(1))
        if kind in ("weight_norm", "old_weight_norm", "spectral", "orthogonal", "frozen", "linear"):
            return layer(x)
        if kind == "twice":
            return layer(torch.tanh(layer(x)))
        if kind == "in_place":
            return layer(x).add_(1).mul_(0.5)
        if kind == "time_first":
            return layer(x.transpose(0, 1)).transpose(0, 1)
        if kind == "vmapped":
            return torch.vmap(layer)(x)
        if kind == "loop":
            return torch.stack([layer(x[:, i]) for i in range(x.shape[1])], dim=1)
        w, b = layer.weight, layer.bias
        return self._by_weight(x, w) + (b if b is not None and kind != "turned_back" else 0)

    def _by_weight(self, x: Tensor, w: Tensor) -> Tensor:
        kind, n = self.kind, len(x)
        products: dict[str, Callable[[], Tensor]] = {
            "bare_linear": lambda: F.linear(x, w),
            "matmul": lambda: x @ w,
            "matmul_bias": lambda: torch.matmul(x, w.t()),
            "einsum": lambda: torch.einsum("ntd,de->nte", x, w),
            "einsum_turned": lambda: torch.einsum("ij,nkj->nki", w, x),
            "tensordot": lambda: torch.tensordot(x, w, dims=([2], [1])),
            "addmm": lambda: torch.addmm(w[0], x.reshape(-1, WIDTH), w).view_as(x),
            "bmm": lambda: torch.bmm(x, w.expand(n, -1, -1)),
            "summed": lambda: (x[..., None] * w).sum(-2),
            "chunked": lambda: torch.cat([F.linear(x, part) for part in w.chunk(2)], dim=-1),
            "turned_back": lambda: x @ w @ w.T,
            "function": lambda: _Product.apply(x, w),
            "low_rank": lambda: x @ (w[:, :2] @ w[:2]),
        }
        return products[kind]()


class _Product(torch.autograd.Function):
    """x Wᵀ by a function of the model's own."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).T @ x.flatten(0, -2)


class Norm(nn.Module):
    """A normalisation of features."""

    KINDS = [
        "layer",
        "bare_layer",
        "no_affine",
        "rms",
        "own_rms",
        "batch",
        "group",
        "instance",
        "scaled",
    ]

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        layers: dict[str, Callable[[], nn.Module]] = {
            "layer": lambda: nn.LayerNorm(WIDTH),
            "bare_layer": lambda: nn.LayerNorm(WIDTH),
            "no_affine": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
            "rms": lambda: nn.RMSNorm(WIDTH),
            "own_rms": lambda: nn.RMSNorm(WIDTH),
            "batch": lambda: nn.BatchNorm1d(WIDTH),
            "group": lambda: nn.GroupNorm(2, WIDTH),
            "instance": lambda: nn.InstanceNorm1d(WIDTH, affine=True, track_running_stats=True),
            "scaled": lambda: nn.LayerNorm(WIDTH),
        }
        self.layer = layers[self.kind]()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        layer, kind = self.layer, self.kind
        if kind in ("batch", "group", "instance"):
            return layer(x.transpose(1, 2)).transpose(1, 2)
        if kind == "bare_layer":
            return F.layer_norm(x, (WIDTH,), layer.weight, layer.bias)
        if kind == "own_rms":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * layer.weight
        if kind == "scaled":
            return layer(x) * (1 + layer.weight)
        return layer(x)


class Recurrent(nn.Module):
    """A recurrent layer over the places."""

    KINDS = ["gru", "gru_time_first", "lstm", "rnn", "two_layers", "start", "cell", "two_ways"]

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        kinds = {"lstm": nn.LSTM, "rnn": nn.RNN}
        first = self.kind != "gru_time_first"
        if self.kind == "cell":
            self.layer: nn.Module = nn.GRUCell(WIDTH, WIDTH)
        elif self.kind == "two_ways":
            self.layer = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        else:
            layers = 2 if self.kind == "two_layers" else 1
            self.layer = kinds.get(self.kind, nn.GRU)(WIDTH, WIDTH, layers, batch_first=first)
        self.start = parameter(1, 1, WIDTH) if self.kind == "start" else None

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.kind == "gru_time_first":
            return self.layer(x.transpose(0, 1))[0].transpose(0, 1)
        if self.kind == "start":
            return self.layer(x, self.start.expand(-1, len(x), -1).contiguous())[0]
        if self.kind == "cell":
            state, states = x.new_zeros(len(x), WIDTH), []
            for i in range(x.shape[1]):
                state = self.layer(x[:, i], state)
                states.append(state)
            return torch.stack(states, dim=1)
        return self.layer(x)[0]


class Attention(nn.Module):
    """Self-attention of two heads."""

    KINDS = [
        "own",
        "fused",
        "sdpa",
        "sdpa_causal",
        "sdpa_mask",
        "multihead",
        "multihead_time_first",
        "multihead_masked",
        "bias",
        "linear",
        "encoder",
        "shared_qk",
    ]

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        first = self.kind != "multihead_time_first"
        if self.kind.startswith("multihead"):
            self.layer: nn.Module = nn.MultiheadAttention(WIDTH, 2, batch_first=first)
        elif self.kind == "encoder":
            self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, batch_first=True)
        else:
            self.layer = nn.Linear(WIDTH, 3 * WIDTH, bias=rng.random() < 0.5)
            self.out = nn.Linear(WIDTH, WIDTH)
        self.bias = parameter(2, LENGTH, LENGTH) if self.kind == "bias" else None

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        t = x.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        if self.kind == "encoder":
            return self.layer(x, src_mask=~causal)
        if self.kind == "multihead_time_first":
            y = x.transpose(0, 1)
            return self.layer(y, y, y, need_weights=False)[0].transpose(0, 1)
        if self.kind == "multihead_masked":
            return self.layer(x, x, x, attn_mask=~causal)[0]
        if self.kind == "multihead":
            return self.layer(x, x, x, need_weights=True)[0]
        q, k, v = (
            part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.layer(x).chunk(3, dim=-1)
        )
        if self.kind == "shared_qk":
            k = q
        return self.out(self._mixed(q, k, v, causal).transpose(1, 2).flatten(2))

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, causal: Tensor) -> Tensor:
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        if self.kind == "sdpa_causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.kind == "sdpa_mask":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
        if self.kind == "linear":
            return F.elu(q) @ (F.elu(k).transpose(-1, -2) @ v)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.bias is not None:
            scores = scores + self.bias[:, : q.shape[2], : q.shape[2]]
        return scores.masked_fill(~causal, -1e9).softmax(-1) @ v
