"""The parts that Transformer encoders share: attention, feed-forward, block, positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern.checks import check_choice, check_count, check_unit
from fisherkern.encoders.base import take
from fisherkern.encoders.symmetry import Symmetries, SymmetryGroup, whole
from fisherkern.errors import InputError

#: Feed-forward activations by name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    """Multi-head attention softmax(q kᵀ / sqrt(D / heads)) v of some positions over all of them."""

    absorbs_projections = True  # for one query, outside training: see `_of_one`

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self._scale = (dim // heads) ** -0.5
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, x: Tensor, hidden: Tensor) -> Tensor:
        """Let `queries` (N, Q, D) attend to `x` (N, T, D) except where `hidden` (N, 1 or Q, T)."""
        if queries.shape[1] == 1 and not self.training:
            return self._of_one(queries[:, 0], x, hidden[:, :, 0])[:, None]
        q, k, v = (self._split(s) for s in (self.query(queries), self.key(x), self.value(x)))
        mask = _lowest(hidden, q.dtype)
        if self.training:
            # Whatever can be is done to q and in place: of (N, heads, Q, T) tensors the softmax
            # alone is kept for the backward pass, which goes through them once.
            scores = (q * self._scale @ k.transpose(2, 3)).add_(mask)
            context = self.dropout(scores.softmax(dim=-1)) @ v
        else:
            context = F.scaled_dot_product_attention(q, k, v, mask, scale=self._scale)
        return self.output(context.transpose(1, 2).flatten(2))

    def _of_one(self, queries: Tensor, x: Tensor, hidden: Tensor) -> Tensor:
        """Compute the same for one query a sequence, (N, D), without T keys and values.

        qᵀ(K x_t + c) = (Kᵀq)ᵀx_t + qᵀc and Σ_t a_t (V x_t + d) = V Σ_t a_t x_t + d, head by
        head: D·heads products a position in place of 2 D², forward and backward.
        """
        q = (self.query(queries) * self._scale).unflatten(1, (self.heads, -1))
        width = q.shape[2]
        rows = [slice(i * width, (i + 1) * width) for i in range(self.heads)]
        seen, offsets = [], []
        for i, part in enumerate(rows):
            seen.append(q[:, i] @ self.key.weight[part])
            offsets.append(F.linear(q[:, i], self.key.bias[part][None]))
        scores = torch.stack(seen, dim=1) @ x.transpose(1, 2) + torch.stack(offsets, dim=1)
        mixed = scores.add_(_lowest(hidden, scores.dtype)).softmax(dim=-1) @ x
        values, bias = self.value.weight, self.value.bias
        heads = [F.linear(mixed[:, i], values[part], bias[part]) for i, part in enumerate(rows)]
        return self.output(torch.cat(heads, dim=1))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _lowest(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what takes the scores out of the softmax where `hidden`, zero elsewhere.

    The lowest finite number, not -inf: a row that is all padding must not become NaN.
    """
    return hidden.to(dtype) * torch.finfo(dtype).min


class FeedForward(nn.Module):
    """outer(activation(inner(x))), position by position."""

    def __init__(self, dim: int, inner_dim: int, activation: str) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, inner_dim)
        self.outer = nn.Linear(inner_dim, dim)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (.., D) to (.., D)."""
        return self.outer(self.activation(self.inner(x)))


class Block(nn.Module):
    """Attention and feed-forward, each with a residual connection and a layer norm.

    The norm comes after the sum ("post", as in BERT) or before each sub-layer ("pre").
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        inner_dim: int,
        dropout: float,
        attention_dropout: float,
        norm: str,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.attention = SelfAttention(dim, heads, attention_dropout)
        self.attention_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, inner_dim, activation)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """(N, T, D) to (N, T, D), or to (N, Q, D): the outputs at `positions` (N, Q) alone.

        `hidden` bool, (N, 1, 1 or Q, T), is true where a position may not be attended to.
        """
        source = self.attention_norm(x) if self.pre else x
        queries = take(source, positions)
        x = queries if not self.pre else take(x, positions)
        x = x + self.dropout(self.attention(queries, source, hidden))
        if self.pre:
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x)
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


def position_ids(tokens: Tensor, max_len: int) -> Tensor:
    """Rows of the position table, (N, T): the last column is always row `max_len` - 1."""
    width = tokens.shape[1]
    return torch.arange(max_len - width, max_len, device=tokens.device).expand_as(tokens)


def check_blocks(owner: str, config: Mapping[str, Any]) -> None:
    """Raise InputError for arguments of `owner` that no `Block` can be made of."""
    for name in ("layers", "heads", "inner_dim"):
        check_count(f"{owner}: {name}", config[name])
    if config["dim"] % config["heads"]:
        raise InputError(
            f"{owner}: heads = {config['heads']} does not divide dim = {config['dim']}"
        )
    check_choice(f"{owner}: norm", config["norm"], ("post", "pre"))
    for name in ("dropout", "attention_dropout"):
        check_unit(f"{owner}: {name}", config[name], "[0, 1)")


def transformer_symmetries(model: Any, kind: str) -> Symmetries:
    """Symmetries of embedding tables and `model.blocks`; the residual stream has group `kind`."""
    # A key's bias adds the same number to all scores of a query, which the softmax ignores.
    idle = frozenset(f"blocks.{i}.attention.key.bias" for i in range(len(model.blocks)))
    groups = {"residual": SymmetryGroup(model.dim, kind)}
    symmetries = Symmetries(groups, {"position_embedding.weight": whole(None, "residual")}, idle)
    symmetries.add_items(model, "residual")
    for index, block in enumerate(model.blocks):
        _add_block(symmetries, block, f"blocks.{index}", "residual")
    return symmetries


def _add_block(symmetries: Symmetries, block: Any, name: str, residual: str) -> None:
    attention, inner = f"{name}.attention", f"{name}.feed_forward"
    qk, vo = f"{attention}.qk", f"{attention}.vo"
    inner_dim, dim = block.feed_forward.inner.weight.shape
    # q·k stays when both turn alike; so does the output when the values turn one way and the
    # output weights the other. Heads are summed, so their order is free.
    symmetries.groups[attention] = SymmetryGroup(dim, "heads", (qk, vo), block.attention.heads)
    symmetries.groups[inner] = SymmetryGroup(inner_dim)
    for projection, label in (("query", qk), ("key", qk), ("value", vo)):
        symmetries.add_linear(f"{attention}.{projection}", label, residual)
    symmetries.add_linear(f"{attention}.output", residual, vo)
    symmetries.add_linear(f"{inner}.inner", inner, residual)
    symmetries.add_linear(f"{inner}.outer", residual, inner)
    symmetries.add_norm(f"{name}.attention_norm", residual)
    symmetries.add_norm(f"{name}.feed_forward_norm", residual)
    if block.pre:
        projections = [f"{attention}.{projection}" for projection in ("query", "key", "value")]
        symmetries.fold(f"{name}.attention_norm", projections)
        symmetries.fold(f"{name}.feed_forward_norm", [f"{inner}.inner"])


def has_constant_gain(norm: Any) -> bool:
    """Whether all channels have the same gain, up to the rounding of an earlier rotation."""
    gain = norm.weight.detach().double()
    spread = float((gain - gain.mean()).abs().max())
    return spread <= 8 * torch.finfo(norm.weight.dtype).eps * float(gain.abs().max())
