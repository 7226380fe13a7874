"""GRU4Rec: a recurrent network read from the oldest item to the newest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern.checks import check_count, check_unit
from fisherkern.encoders.base import Batch, SequenceEncoder, take
from fisherkern.encoders.items import ItemParts, item_settings, item_table
from fisherkern.encoders.symmetry import AxisSpec, Symmetries, SymmetryGroup


class GRU4Rec(SequenceEncoder):
    """GRU4Rec with item embeddings: a recurrent network, as RecBole has it.

    x_t = dropout(item_embedding); s_0 = 0 and, in each of `layers` layers of width H,

        z = sigmoid(W_z x_t + U_z s_{t-1}),  r = sigmoid(W_r x_t + U_r s_{t-1})
        c = tanh(W_c x_t + r * (U_c s_{t-1})),  s_t = z * s_{t-1} + (1 - z) * c
        h = dense(s_T),  logits = W h + b

    The paper has one-hot items for x_t, an output layer of its own, U_c (r * s_{t-1}) where torch's
    GRU has r * (U_c s_{t-1}), and z where this has 1 - z. The GRU has no biases, as in the paper's
    equations. Padding is stepped over: it leaves s as it was, and s is zero before the first item.
    Embedding rows: 0 padding (zero, never trained), 1..V items.

    Args:
        num_items: V, the size of the catalogue.
        max_len: items of a history that are read, its last ones.
        dim: D, the width of embeddings and of h.
        layers: recurrent layers.
        hidden_dim: H; None: 2 D.
        dropout: on the embeddings, in [0, 1).
        tied: W is the item rows of the embedding, else a matrix of its own.
        bias: whether there is a b.
        init_std: deviation of the initial embeddings, see `BERT4Rec`; the GRU's six matrices start
            as linear layers there.
        items: what items are made of beside their ids, see `ItemParts`; None: nothing.

    Raises:
        InputError: a size below 1, or a dropout outside [0, 1).

    Source:
        Hidasi et al., ICLR 2016.
    """

    causal = True

    def __init__(
        self,
        num_items: int,
        max_len: int = 50,
        dim: int = 64,
        layers: int = 1,
        hidden_dim: int | None = None,
        dropout: float = 0.2,
        tied: bool = True,
        bias: bool = False,
        init_std: float = 0.02,
        items: ItemParts | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(num_items, max_len, dim)
        hidden_dim = 2 * dim if hidden_dim is None else hidden_dim
        self.config = {
            "num_items": num_items,
            "max_len": max_len,
            "dim": dim,
            "layers": layers,
            "hidden_dim": hidden_dim,
            "dropout": dropout,
            "tied": tied,
            "bias": bias,
            "init_std": init_std,
            **item_settings(items),
        }
        check_count("GRU4Rec: layers", layers)
        check_count("GRU4Rec: hidden_dim", hidden_dim)
        check_unit("GRU4Rec: dropout", dropout, "[0, 1)")
        self.item_embedding = item_table(num_items + 1, num_items, dim, items)
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(dim, hidden_dim, layers, bias=False, batch_first=True)
        self.dense = nn.Linear(hidden_dim, dim)
        self.transform = nn.Identity()
        self.add_output(tied, bias)
        self.initialize(init_std)
        for matrix in self.gru.parameters():
            for gate in matrix.detach().chunk(3):
                nn.init.xavier_uniform_(gate)

    def states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """dense(s_t), (N, T, D); with `positions` (N, Q) int64, those alone.

        `tokens` (N, T <= max_len) int64; padding may be anywhere, and the state there is that
        of the last item before it.
        """
        self.check_width(tokens)
        number = (tokens != 0).cumsum(dim=1)  # of items up to and with each column
        packed = _without_padding(tokens, number)
        steps, _ = self.gru(self.dropout(self.item_embedding(packed)))
        steps = F.pad(steps, (0, 0, 1, 0))  # s_0
        return self.dense(take(steps, number if positions is None else number.gather(1, positions)))

    def encode(self, batch: Batch) -> Tensor:
        """Encode h (N, D) after the last item of each history; see `SequenceEncoder`.

        Equals `transform(states(read_history(batch))[:, -1])`; takes as many steps as the
        longest history has items.
        """
        tokens = self.read_history(batch)
        last = tokens.new_full((tokens.shape[0], 1), tokens.shape[1] - 1)
        return self.transform(self.states(tokens, last).squeeze(1))

    def symmetries(self) -> Symmetries:
        """Return what each space of the network admits, for `align`.

        The item table's space, and that of h, lie between linear maps: any orthogonal map. A
        hidden unit may change places with another and, as tanh is odd and the state is linear in
        the candidates, its sign; the gates' own rows have no sign to change.
        """
        tied, hidden_dim = self.config["tied"], self.config["hidden_dim"]
        hidden = "items" if tied else "hidden"
        symmetries = Symmetries({"items": SymmetryGroup(self.dim, "orthogonal")}, {})
        if not tied:
            symmetries.groups[hidden] = SymmetryGroup(self.dim, "orthogonal")
        symmetries.add_items(self, "items")
        below, below_dim = "items", self.dim
        for layer in range(self.config["layers"]):
            state, gates = f"gru.{layer}", f"gru.{layer}.gates"
            symmetries.groups[state] = SymmetryGroup(hidden_dim, "signed", (state, gates))
            for name, label, size in (("ih", below, below_dim), ("hh", state, hidden_dim)):
                symmetries.axes[f"gru.weight_{name}_l{layer}"] = (
                    AxisSpec((None, gates, label), (2, hidden_dim, size), 0, 0, 2 * hidden_dim),
                    AxisSpec((state, label), None, 0, 2 * hidden_dim, hidden_dim),
                )
            below, below_dim = state, hidden_dim
        symmetries.add_linear("dense", hidden, below)
        symmetries.add_output(self, hidden)
        return symmetries


def _without_padding(tokens: Tensor, number: Tensor) -> Tensor:
    """Move the items of each row to its left end, (N, longest row's number of items or 1).

    `number` (N, T) int64 counts the items of a row up to each column.
    """
    items = tokens.new_zeros(tokens.shape[0], tokens.shape[1] + 1)
    items = items.scatter(1, number.masked_fill(tokens == 0, 0), tokens)
    longest = int(number[:, -1].max()) if len(number) else 0
    return items[:, 1 : 1 + max(1, longest)]
