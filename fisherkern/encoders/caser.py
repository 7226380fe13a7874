"""Caser: convolutions over a window of the last items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern.checks import check_count, check_unit
from fisherkern.encoders.base import Batch, SequenceEncoder, take
from fisherkern.encoders.items import ItemParts, item_settings, item_table
from fisherkern.encoders.symmetry import AxisSpec, Symmetries, SymmetryGroup, whole


class Caser(SequenceEncoder):
    """Caser without its user embedding: convolutions over a window of the last items.

    E (L, D) are the embeddings of the last L = `window` items. With relu(a, b) elementwise:

        horizontal, heights 1..L:  o_k = max_i relu(<F_k, E[i : i + height]> + b_k)
        vertical:                  v_k = sum_l G_kl E[l],  G_k (L,)
        h = relu(W_1 dropout([v; o]) + b_1),  logits = W h + b

    The paper joins an embedding of the user to h; here sequences stand for themselves, as next
    items are asked of users never seen, so W is (V, D). Embedding rows: 0 padding (zero, never
    trained), 1..V items; a history of fewer than L items has padding before it.

    Args:
        num_items: V, the size of the catalogue.
        max_len: bounds what `states` is given at once, and nothing else.
        dim: D, the width of embeddings and of h.
        window: L, the last items that are read.
        horizontal: filters F_k (height, D) of each height.
        vertical: filters G_k (L,).
        dropout: on the filters' results, in [0, 1).
        tied: W is the item rows of the embedding, else a matrix of its own, as in the paper.
        bias: whether there is a b.
        init_std: deviation of the initial embeddings, see `BERT4Rec`; filters start as linear
            layers there.
        items: what items are made of beside their ids, see `ItemParts`; None: nothing.

    Raises:
        InputError: a size below 1, or a dropout outside [0, 1).

    Source:
        Tang and Wang, WSDM 2018.
    """

    causal = True

    def __init__(
        self,
        num_items: int,
        max_len: int = 50,
        dim: int = 64,
        window: int = 5,
        horizontal: int = 16,
        vertical: int = 4,
        dropout: float = 0.5,
        tied: bool = False,
        bias: bool = True,
        init_std: float = 0.02,
        items: ItemParts | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(num_items, max_len, dim)
        self.config = {
            "num_items": num_items,
            "max_len": max_len,
            "dim": dim,
            "window": window,
            "horizontal": horizontal,
            "vertical": vertical,
            "dropout": dropout,
            "tied": tied,
            "bias": bias,
            "init_std": init_std,
            **item_settings(items),
        }
        for name in ("window", "horizontal", "vertical"):
            check_count(f"Caser: {name}", self.config[name])
        check_unit("Caser: dropout", dropout, "[0, 1)")
        self.window = window
        self.item_embedding = item_table(num_items + 1, num_items, dim, items)
        # A filter is a linear map of the embeddings it covers, laid side by side.
        self.horizontal = nn.ModuleList(
            nn.Linear(height * dim, horizontal) for height in range(1, window + 1)
        )
        # Without a bias: that of `dense` does the same.
        self.vertical = nn.Linear(window, vertical, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(vertical * dim + horizontal * window, dim)
        self.transform = nn.Identity()
        self.add_output(tied, bias)
        self.initialize(init_std)

    def states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return h of the window that ends at each column, (N, T, D), or at `positions` (N, Q).

        `tokens` (N, T <= max_len) int64. Every filter runs over the sequence once, whatever
        the number of windows it is in. Allocates N T D L (L + 1) / 2 numbers for the filters.
        """
        self.check_width(tokens)
        features = take(self._features(F.pad(tokens, (self.window - 1, 0))), positions)
        return self.dense(self.dropout(features)).relu()

    def encode(self, batch: Batch) -> Tensor:
        """Encode h (N, D) of the last `window` items of each history; see `SequenceEncoder`.

        Equals `transform(states(read_history(batch))[:, -1])`, but for one window only.
        """
        tokens = self.read_history(batch)
        # A negative extent cuts.
        features = self._features(F.pad(tokens, (self.window - tokens.shape[1], 0)))
        return self.transform(self.dense(self.dropout(features.squeeze(1))).relu())

    def _features(self, tokens: Tensor) -> Tensor:
        """[v; o] of every window of `tokens` (N, T + L - 1): (N, T, vertical D + horizontal L)."""
        x = self.item_embedding(tokens)
        found = [self.vertical(x.unfold(1, self.window, 1)).transpose(2, 3).flatten(2)]
        for height, layer in enumerate(self.horizontal, start=1):
            count = x.shape[1] - height + 1
            covered = torch.cat([x[:, i : i + count] for i in range(height)], dim=2)
            results = layer(covered).relu().transpose(1, 2)
            best = F.max_pool1d(results, self.window - height + 1, stride=1)
            found.append(best.transpose(1, 2))
        return torch.cat(found, dim=2)

    def symmetries(self) -> Symmetries:
        """Return what each space of the network admits, for `align`.

        Filters of one height may change places; vertical ones, read linearly, may be turned. So
        may the item table's space, unless it is tied to that of h, which follows a ReLU and
        admits permutations.
        """
        tied, dim = self.config["tied"], self.dim
        vertical, count = self.config["vertical"], self.config["horizontal"]
        hidden, kind = ("items", "permutation") if tied else ("hidden", "orthogonal")
        symmetries = Symmetries({"items": SymmetryGroup(dim, kind)}, {})
        if not tied:
            symmetries.groups[hidden] = SymmetryGroup(dim)
        symmetries.groups["vertical"] = SymmetryGroup(vertical, "orthogonal")
        symmetries.add_items(self, "items")
        symmetries.axes["vertical.weight"] = whole("vertical", None)
        start = vertical * dim
        dense = [AxisSpec((hidden, "vertical", "items"), (dim, vertical, dim), 1, 0, start)]
        for index in range(self.window):
            name = f"horizontal.{index}"
            symmetries.groups[name] = SymmetryGroup(count)
            symmetries.axes[f"{name}.weight"] = (
                AxisSpec((name, None, "items"), (count, index + 1, dim)),
            )
            symmetries.axes[f"{name}.bias"] = whole(name)
            dense.append(AxisSpec((hidden, name), None, 1, start, count))
            start += count
        symmetries.axes["dense.weight"] = tuple(dense)
        symmetries.axes["dense.bias"] = whole(hidden)
        symmetries.add_output(self, hidden)
        return symmetries
