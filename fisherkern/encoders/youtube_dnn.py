"""YouTube DNN: a feed-forward network on the mean of the history's items."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fisherkern.checks import check_count, check_unit
from fisherkern.encoders.base import Batch, SequenceEncoder, prefix_means, take, whole_mean
from fisherkern.encoders.items import ItemParts, item_settings, item_table
from fisherkern.encoders.symmetry import Symmetries, SymmetryGroup


class YouTubeDNN(SequenceEncoder):
    """YouTube's candidate generation: a feed-forward network on the mean of the history's items.

        x_0 = dropout((1/n) Σ_i item_embedding_i),  x_l = relu(A_l x_{l-1} + a_l)
        h = x_L, of width D,  logits = W h + b

    The paper joins searches, demographics and the example's age to x_0, which sequences have not,
    and trains by a sampled softmax (`NextItem("sampled_softmax", log_q=True)`). Embedding rows: 0
    padding (zero, never trained), 1..V items.

    Args:
        num_items: V, the size of the catalogue.
        max_len: items of a history that are read, its last ones.
        dim: D, the width of embeddings and of h.
        layers: L, at least 1.
        hidden_dim: width of x_1 to x_{L-1}; None: 2 D.
        dropout: on x_0 to x_{L-1}, in [0, 1).
        tied: W is the item rows of the embedding, else a matrix of its own, as in the paper.
        bias: whether there is a b.
        init_std: deviation of the initial embeddings, see `BERT4Rec`.
        items: what items are made of beside their ids, see `ItemParts`; None: nothing.

    Raises:
        InputError: a size below 1, or a dropout outside [0, 1).

    Source:
        Covington et al., RecSys 2016.
    """

    causal = True

    def __init__(
        self,
        num_items: int,
        max_len: int = 50,
        dim: int = 64,
        layers: int = 2,
        hidden_dim: int | None = None,
        dropout: float = 0.2,
        tied: bool = False,
        bias: bool = True,
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
        check_count("YouTubeDNN: layers", layers)
        check_count("YouTubeDNN: hidden_dim", hidden_dim)
        check_unit("YouTubeDNN: dropout", dropout, "[0, 1)")
        self.item_embedding = item_table(num_items + 1, num_items, dim, items)
        self.dropout = nn.Dropout(dropout)
        widths = [dim, *[hidden_dim] * (layers - 1), dim]
        self.layers = nn.ModuleList(
            nn.Linear(inner, outer) for inner, outer in itertools.pairwise(widths)
        )
        self.transform = nn.Identity()
        self.add_output(tied, bias)
        self.initialize(init_std)

    def states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return h of the items up to each column, (N, T, D), or at `positions` (N, Q)."""
        self.check_width(tokens)
        x = take(prefix_means(self.item_embedding(tokens), tokens), positions)
        return self._of_mean(x)

    def encode(self, batch: Batch) -> Tensor:
        """Encode h (N, D) of each history; see `SequenceEncoder`.

        Equals `transform(states(read_history(batch))[:, -1])`, without the prefixes.
        """
        tokens = self.read_history(batch, least=1)
        x = whole_mean(self.item_embedding(tokens), tokens)
        return self.transform(self._of_mean(x))

    def _of_mean(self, x: Tensor) -> Tensor:
        """Return x_L (.., D) of the mean (.., D)."""
        for layer in self.layers:
            x = layer(self.dropout(x)).relu()
        return x

    def symmetries(self) -> Symmetries:
        """Return what each space of the network admits, for `align`.

        Hidden units may change places, those of h too. The item table's space is read linearly:
        any orthogonal map, unless it is tied to that of h.
        """
        tied, last = self.config["tied"], len(self.layers) - 1
        hidden, kind = ("items", "permutation") if tied else ("hidden", "orthogonal")
        symmetries = Symmetries({"items": SymmetryGroup(self.dim, kind)}, {})
        if not tied:
            symmetries.groups[hidden] = SymmetryGroup(self.dim)
        symmetries.add_items(self, "items")
        below = "items"
        for index in range(last + 1):
            name = f"layers.{index}"
            if index < last:
                symmetries.groups[name] = SymmetryGroup(self.config["hidden_dim"])
            label = name if index < last else hidden
            symmetries.add_linear(name, label, below)
            below = label
        symmetries.add_output(self, hidden)
        return symmetries
