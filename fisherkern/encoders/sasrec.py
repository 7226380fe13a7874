"""SASRec: a causal Transformer that predicts the next item at every position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.checks import check_choice
from fisherkern.encoders.base import Batch, SequenceEncoder
from fisherkern.encoders.items import ItemParts, item_settings, item_table
from fisherkern.encoders.symmetry import Symmetries
from fisherkern.encoders.transformer import (
    ACTIVATIONS,
    Block,
    check_blocks,
    has_constant_gain,
    position_ids,
    transformer_symmetries,
)


class SASRec(SequenceEncoder):
    """SASRec: a causal Transformer that predicts the next item at every position.

        x = dropout(sqrt(D) item_embedding + position_embedding)
        `layers` blocks in which a position attends to itself and the items before it
        h = LN(state),  logits = W h + b

    The defaults are the paper's network: one head, x + dropout(g(LN(x))) for both sub-layers g
    (`norm` "pre"), and outer(relu(inner(x))) of width `inner_dim` = D. As in torch's attention
    there are biases and an output projection, which the paper has not; its TensorFlow code adds g
    to LN(x) rather than to x. RecBole's and DuoRec's network is `norm="post", activation="gelu",
    inner_dim=4 * dim, heads=2, scaled=False`: x is normed before dropout, each sum after its
    sub-layer, and the state is h.

    Embedding rows: 0 padding (zero, never trained), 1..V items. Positions are counted from the
    right end: the last column is always row `max_len` - 1 of the position table, so a short batch,
    a trimmed one and a full one agree.

    Args:
        num_items: V, the size of the catalogue.
        max_len: items of a history that are read, its last ones.
        dim: D, the width of states and embeddings.
        layers: Transformer blocks.
        heads: attention heads; they divide `dim`.
        dropout: on embeddings and on both sub-layers' outputs, in [0, 1).
        attention_dropout: on attention weights; None: `dropout`.
        inner_dim: width of the feed-forward layer; None: D.
        norm: "pre" or "post", where a block's layer norms stand.
        activation: "relu" or "gelu", of the feed-forward layer.
        scaled: multiply item embeddings by sqrt(D).
        tied: W is the item rows of the embedding, else a matrix of its own.
        bias: whether there is a b.
        init_std: deviation of the initial embeddings, see `BERT4Rec`.
        items: what items are made of beside their ids, see `ItemParts`; None: nothing.

    Raises:
        InputError: a size below 1, a width that `heads` does not divide, an unknown `norm` or
            `activation`, or a dropout outside [0, 1).

    Source:
        Kang and McAuley, ICDM 2018.
    """

    causal = True

    def __init__(
        self,
        num_items: int,
        max_len: int = 50,
        dim: int = 64,
        layers: int = 2,
        heads: int = 1,
        dropout: float = 0.2,
        attention_dropout: float | None = None,
        inner_dim: int | None = None,
        norm: str = "pre",
        activation: str = "relu",
        scaled: bool = True,
        tied: bool = True,
        bias: bool = False,
        init_std: float = 0.02,
        items: ItemParts | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(num_items, max_len, dim)
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        inner_dim = dim if inner_dim is None else inner_dim
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
            "activation": activation,
            "scaled": scaled,
            "tied": tied,
            "bias": bias,
            "init_std": init_std,
            **item_settings(items),
        }
        check_blocks("SASRec", self.config)
        check_choice("SASRec: activation", activation, ACTIVATIONS)
        pre = norm == "pre"
        self.scale = dim**0.5 if scaled else 1.0
        self.item_embedding = item_table(num_items + 1, num_items, dim, items)
        self.position_embedding = nn.Embedding(max_len, dim)
        self.embedding_norm = nn.Identity() if pre else nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, heads, inner_dim, dropout, attention_dropout, norm, activation)
            for _ in range(layers)
        )
        self.final_norm = nn.LayerNorm(dim) if pre else nn.Identity()
        self.transform = nn.Identity()
        self.add_output(tied, bias)
        self.initialize(init_std)

    def states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Causal states, (N, T, D); with `positions` (N, Q) int64, those alone.

        `tokens` (N, T <= max_len) int64; padding may be anywhere and is attended to by
        nobody else. With `positions` the last block computes its query, output and
        feed-forward for them only. Holds layers x heads attention maps (N, T, T).
        """
        self.check_width(tokens)
        x = self.scale * self.item_embedding(tokens)
        x = x + self.position_embedding(position_ids(tokens, self.max_len))
        x = self.dropout(self.embedding_norm(x))
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = _hidden(tokens, columns[None])
        for block in self.blocks[:-1]:
            x = block(x, hidden)
        if positions is not None:
            hidden = _hidden(tokens, positions)
        return self.final_norm(self.blocks[-1](x, hidden, positions))

    def encode(self, batch: Batch) -> Tensor:
        """Encode h (N, D) of the last item of each history; see `SequenceEncoder`.

        Equals `transform(states(read_history(batch))[:, -1])`, but computes the last block
        there alone, and nothing for padding that the whole batch shares.
        """
        tokens = self.read_history(batch, least=1)
        last = tokens.new_full((tokens.shape[0], 1), tokens.shape[1] - 1)
        return self.transform(self.states(tokens, last).squeeze(1))

    def symmetries(self) -> Symmetries:
        """Return what the residual stream, the space of items and of h, admits, for `align`.

        With norm="pre" only layer norms read it. All but the last fold into linear layers. The
        last folds into an output matrix of its own (untied), and the stream may be rotated; tied,
        it may where the last gain is constant. With norm="post" it may be permuted.
        """
        pre, tied = self.config["norm"] == "pre", self.config["tied"]
        norm: Any = self.final_norm
        rotates = pre and tied and has_constant_gain(norm)
        if pre and not tied:
            zero_gain = (norm.weight == 0) & (norm.bias != 0)
            rotates = self.config["bias"] or not bool(zero_gain.any())
        symmetries = transformer_symmetries(self, "rotation" if rotates else "permutation")
        symmetries.add_norm("final_norm" if pre else "embedding_norm", "residual")
        if pre and not tied:
            bias = "output_bias" if self.config["bias"] else None
            symmetries.folds["final_norm"] = (("output_embedding", bias),)
        symmetries.add_output(self, "residual")
        return symmetries


def _hidden(tokens: Tensor, queries: Tensor) -> Tensor:
    """Which keys a query may not see, bool (N, 1, Q, T): later ones, and padding.

    `queries` (N or 1, Q) are columns. A position always sees itself, so a column of padding
    with no item before it has a state of its own that does not depend on the width.
    """
    keys = torch.arange(tokens.shape[1], device=tokens.device)
    queries = queries.unsqueeze(2)
    padding = (tokens == 0).unsqueeze(1)
    return ((keys > queries) | padding & (keys != queries)).unsqueeze(1)
