"""FISM: the mean of the history's items beside the next one, as BPR takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fisherkern.checks import check_unit
from fisherkern.encoders.base import Batch, SequenceEncoder, prefix_means, take, whole_mean
from fisherkern.encoders.items import ItemParts, item_settings, item_table
from fisherkern.encoders.symmetry import Symmetries, SymmetryGroup


class FISM(SequenceEncoder):
    """FISM: matrix factorisation whose user is the sum of the items in the history.

        h_t = n_t^-alpha Σ_{i <= t} dropout(item_embedding_i),  n_t items up to column t
        logits = W h + b

    This is BPR's matrix factorisation for a sequence encoder: BPR has a factor of its own for every
    user, which nobody has who was not in training, so here the history stands for the user. With
    `NextItem("bpr", 1)` it is trained by BPR's loss; FISM's own is the squared error or AUC over
    all pairs, and it leaves the target itself out of the mean, which a history does not hold.
    Order plays no part. Embedding rows: 0 padding (zero, never trained), 1..V items.

    Args:
        num_items: V, the size of the catalogue.
        max_len: items of a history that are read, its last ones.
        dim: D, the width of embeddings and of h.
        alpha: 1 for the mean, 0 for the sum.
        dropout: on the embeddings, in [0, 1).
        tied: W is the item rows of the embedding, else a matrix of its own, as in the paper.
        bias: whether there is a b.
        init_std: deviation of the initial embeddings, see `BERT4Rec`.
        items: what items are made of beside their ids, see `ItemParts`; None: nothing.

    Raises:
        InputError: a size below 1, an alpha outside [0, 1], or a dropout outside [0, 1).

    Source:
        Kabbur et al., FISM, KDD 2013; Rendle et al., BPR, UAI 2009.
    """

    causal = True

    def __init__(
        self,
        num_items: int,
        max_len: int = 50,
        dim: int = 64,
        alpha: float = 1.0,
        dropout: float = 0.2,
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
            "alpha": alpha,
            "dropout": dropout,
            "tied": tied,
            "bias": bias,
            "init_std": init_std,
            **item_settings(items),
        }
        check_unit("FISM: alpha", alpha)
        check_unit("FISM: dropout", dropout, "[0, 1)")
        self.alpha = alpha
        self.item_embedding = item_table(num_items + 1, num_items, dim, items)
        self.dropout = nn.Dropout(dropout)
        self.transform = nn.Identity()
        self.add_output(tied, bias)
        self.initialize(init_std)

    def states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return h of the items up to each column, (N, T, D), or at `positions` (N, Q)."""
        self.check_width(tokens)
        x = self.dropout(self.item_embedding(tokens))
        return take(prefix_means(x, tokens, self.alpha), positions)

    def encode(self, batch: Batch) -> Tensor:
        """Encode h (N, D) of each history; see `SequenceEncoder`.

        Equals `transform(states(read_history(batch))[:, -1])`, without the prefixes.
        """
        tokens = self.read_history(batch, least=1)
        x = self.dropout(self.item_embedding(tokens))
        return self.transform(whole_mean(x, tokens, self.alpha))

    def symmetries(self) -> Symmetries:
        """Return what the space of items and h admits, for `align`: any orthogonal map."""
        symmetries = Symmetries({"items": SymmetryGroup(self.dim, "orthogonal")}, {})
        symmetries.add_items(self, "items")
        symmetries.add_output(self, "items")
        return symmetries
