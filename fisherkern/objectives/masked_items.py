"""Masked items: hide some items of a sequence and predict them from the rest."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fisherkern.checks import check_unit
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives.base import Objective, Term, same_draws
from fisherkern.objectives.by_length import states_by_length
from fisherkern.objectives.scoring import softmax_loss


@dataclasses.dataclass(frozen=True)
class MaskedItems(Objective):
    """Cloze loss of BERT4Rec: predict masked items from the rest, mean over masked places.

        -(1/|M|) Σ_{(n,t) in M} log softmax(W h_nt + b)[s_nt]

    In a sequence of n items max(1, round(ratio n)) places, drawn uniformly, become the mask token:
    always, never a random item or the item itself.

    Args:
        ratio: share of a sequence's items that is masked, in (0, 1].
        last_ratio: share of the sequences, drawn at random, in which the last item alone is masked
            instead, which is what the model is asked at inference; in [0, 1].

    Raises:
        InputError: a share outside its interval, or an encoder without a mask token.

    Source:
        Sun et al., CIKM 2019, section 3.6.
    """

    ratio: float = 0.2
    last_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_unit("MaskedItems: ratio", self.ratio, "(0, 1]")
        check_unit("MaskedItems: last_ratio", self.last_ratio)

    def __call__(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the loss, 0-dim, of `tokens` (N, T) int64 left-padded with 0.

        Scores the masked places only; `softmax_loss` says what it holds. `generator` is on the
        CPU, so that the draws do not depend on the model's device. Raises InputError if no row
        has an item.
        """
        h, column, _ = self.places(model, tokens, generator)
        return softmax_loss(h, column, *model.head())

    def places(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return h (|M|, D), and the columns and rows (|M|,) int64 of the masked items.

        Arguments as in a call.
        """
        positions, chosen = self.draw(tokens, generator)
        masked = model.mask_items(tokens, positions, chosen)
        h = model.transform(states_by_length(model, masked, positions, chosen)[chosen])
        column = tokens.gather(1, positions)[chosen] - model.first_item
        return h, column, chosen.nonzero()[:, 0]

    def targets(self, model: SequenceEncoder, tokens: Tensor) -> int:
        """Return |M| where `last_ratio` is 0."""
        return int(self._counts((tokens != 0).sum(dim=1)).sum())

    def terms(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> list[Term]:
        """Return the loss with |M|."""
        count = self.targets(model, tokens)
        if self.last_ratio:
            count = int(self.draw(tokens, same_draws(generator))[1].sum())
        return [Term(self(model, tokens, generator), count)]

    def _counts(self, lengths: Tensor) -> Tensor:
        """Return how many places of sequences of `lengths` (N,) items are masked, (N,)."""
        return (lengths * self.ratio).round().long().clamp(min=1).minimum(lengths)

    def draw(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Places to mask: columns (N, Q) int64, distinct in a row, and which count (N, Q) bool.

        Q is the largest number of masked places of any row.
        """
        lengths = (tokens != 0).sum(dim=1)
        counts = self._counts(lengths)
        # The highest keys are masked. Padding stays below every item, whose keys are in [0, 1).
        keys = torch.rand(tokens.shape, generator=generator).to(tokens.device)
        keys = keys.masked_fill(tokens == 0, -1.0)
        if self.last_ratio:
            last_only = torch.rand(len(tokens), generator=generator) < self.last_ratio
            last_only = last_only.to(tokens.device)
            keys[:, -1] = keys[:, -1].masked_fill(last_only & (lengths > 0), 2.0)
            counts = counts.masked_fill(last_only, 1).minimum(lengths)
        most = int(counts.max()) if len(counts) else 0
        if most == 0:
            raise InputError("tokens hold no item to mask: every row is padding")
        positions = keys.topk(most, dim=1).indices
        return positions, torch.arange(most, device=tokens.device) < counts[:, None]
