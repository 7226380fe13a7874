"""BERT4Rec: a bidirectional Transformer that fills in masked items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern.encoders.base import Batch, SequenceEncoder
from fisherkern.encoders.items import ItemParts, item_settings, item_table
from fisherkern.encoders.symmetry import Symmetries, SymmetryGroup
from fisherkern.encoders.transformer import (
    Block,
    check_blocks,
    has_constant_gain,
    position_ids,
    transformer_symmetries,
)


class BERT4Rec(SequenceEncoder):
    """BERT4Rec: a bidirectional Transformer that fills in masked items, with learnt positions.

        x = dropout(LN(item_embedding + position_embedding)),  `layers` Transformer blocks
        h = LN(gelu(dense(state))) at the mask token that `encode` puts after the history
        logits = W h + b

    Embedding rows: 0 padding, 1..V items, V + 1 the mask token. Positions are counted from the
    right end: the last column is always row `max_len` - 1 of the position table, so a short batch,
    a trimmed one and a full one agree. Initial values are drawn from torch's global generator.

    Args:
        num_items: V, the size of the catalogue.
        max_len: columns of a batch, the mask token among them.
        dim: D, the width of states and embeddings.
        layers: Transformer blocks.
        heads: attention heads; they divide `dim`.
        dropout: on embeddings and on both sub-layers' outputs, in [0, 1).
        attention_dropout: on attention weights; None: `dropout`.
        inner_dim: width of the feed-forward layer; None: 4 D.
        norm: "post" or "pre", where a block's layer norms stand.
        tied: W is the item rows of the embedding, else a matrix of its own.
        init_std: deviation of the initial embeddings, a normal truncated at two deviations. Linear
            layers start from Xavier's uniform distribution.
        items: what items are made of beside their ids, see `ItemParts`; None: nothing.

    Raises:
        InputError: a size below 1, a width that `heads` does not divide, an unknown `norm`, or a
            dropout outside [0, 1).

    Source:
        Sun et al., CIKM 2019.
    """

    def __init__(
        self,
        num_items: int,
        max_len: int = 50,
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.2,
        attention_dropout: float | None = None,
        inner_dim: int | None = None,
        norm: str = "post",
        tied: bool = True,
        init_std: float = 0.02,
        items: ItemParts | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(num_items, max_len, dim)
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        inner_dim = 4 * dim if inner_dim is None else inner_dim
        self.config = {
            "num_items": num_items,
            "max_len": max_len,
            "dim": dim,
            "layers": layers,
            "heads": heads,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "inner_dim": inner_dim,
            "norm": norm,
            "tied": tied,
            "init_std": init_std,
            **item_settings(items),
        }
        check_blocks("BERT4Rec", self.config)
        self.mask_token = num_items + 1
        self.item_embedding = item_table(num_items + 2, num_items, dim, items, None)
        self.position_embedding = nn.Embedding(max_len, dim)
        self.embedding_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, heads, inner_dim, dropout, attention_dropout, norm) for _ in range(layers)
        )
        self.final_norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))
        self.add_output(tied, bias=True)
        self.initialize(init_std)

    def states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states before `transform`, (N, T, D); with `positions` (N, Q) int64, those alone.

        `tokens` (N, T <= max_len) int64 holds 0, items and the mask token; padding may be
        anywhere and is not attended to. With `positions` the last block computes its
        query, output and feed-forward for them only.
        """
        self.check_width(tokens)
        x = self.item_embedding(tokens) + self.position_embedding(
            position_ids(tokens, self.max_len)
        )
        x = self.dropout(self.embedding_norm(x))
        padding = (tokens == 0)[:, None, None, :]
        for block in self.blocks[:-1]:
            x = block(x, padding)
        return self.final_norm(self.blocks[-1](x, padding, positions))

    def append_mask(self, history: Tensor) -> Tensor:
        """Append the mask token to `history` (N, T); a full row loses its oldest item."""
        history = history[:, -(self.max_len - 1) :] if self.max_len > 1 else history[:, :0]
        return F.pad(history, (0, 1), value=self.mask_token)

    def encode(self, batch: Batch) -> Tensor:
        """Encode h (N, D) at a mask token after each history; see `SequenceEncoder` for the batch.

        Equals `transform(states(append_mask(history))[:, -1])`. A history of padding
        alone is allowed. Raises InputError as `read_history` does.
        """
        tokens = self.append_mask(self.read_history(batch, least=0))
        last = tokens.new_full((tokens.shape[0], 1), tokens.shape[1] - 1)
        return self.transform(self.states(tokens, last).squeeze(1))

    def mask_items(self, tokens: Tensor, positions: Tensor, chosen: Tensor) -> Tensor:
        """`tokens` (N, T) with the mask token at `positions` (N, Q) where `chosen` (N, Q)."""
        kept = tokens.gather(1, positions)
        return tokens.scatter(1, positions, kept.masked_fill(chosen, self.mask_token))

    def symmetries(self) -> Symmetries:
        """Return what each space of the network admits, for `align`.

        The residual stream starts as g * LN(e + p) + b and goes on beside the layers that read
        it. So g cannot be folded away, and a rotation Q would have to commute with diag(g):
        permutations only, unless g is constant. With norm="post" every later norm says the same.
        The space of h follows a GELU: permutations only. Tied, it is the item table's space and
        thus the residual stream's.
        """
        pre, tied = self.config["norm"] == "pre", self.config["tied"]
        rotates = pre and not tied and has_constant_gain(self.embedding_norm)
        symmetries = transformer_symmetries(self, "rotation" if rotates else "permutation")
        hidden = "residual" if tied else "hidden"
        if not tied:
            symmetries.groups[hidden] = SymmetryGroup(self.dim)
        symmetries.add_norm("embedding_norm", "residual")
        if pre:
            symmetries.add_norm("final_norm", "residual")
            symmetries.fold("final_norm", ["transform.0"])
        symmetries.add_linear("transform.0", hidden, "residual")
        symmetries.add_norm("transform.2", hidden)
        symmetries.add_output(self, hidden)
        return symmetries
