"""Next item: predict every item of a sequence, or its last, from those before it."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.checks import check_choice, check_count, check_unit
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError, shown
from fisherkern.objectives.base import Objective, TrainingSequences, no_loss
from fisherkern.objectives.by_length import states_by_length
from fisherkern.objectives.scoring import softmax_loss

LOSSES = ("softmax", "sampled_softmax", "bce", "gbce", "bpr")


@dataclasses.dataclass(frozen=True)
class NextItem(Objective):
    """Next-item prediction, mean over the P positions that have a next item.

    At each, s+ = W h + b at the next item, and s_k the same at K sampled negatives:

        "softmax"          -log( exp(s+) / Σ_y exp(s_y) )                     y over all V items
        "sampled_softmax"  -log( exp(s+) / (exp(s+) + Σ_k exp(s_k - c_k)) )
        "bce"              -( log σ(s+) + Σ_k log(1 - σ(s_k)) ) / (K + 1)
        "gbce"             -( β log σ(s+) + Σ_k log(1 - σ(s_k)) ) / (K + 1),  β = 1 - t (1 - α)
        "bpr"              -Σ_k log σ(s+ - s_k) / K

    with c_k = log(K q_k) where `log_q` (the sum then is an unbiased estimate of the one over all
    other items) and 0 otherwise, q_k the probability of drawing item k, and α = K / (V - 1).
    Negatives are drawn with replacement; one that is the next item itself does not count, in K
    and K + 1 neither. The full softmax holds what `softmax_loss` says.

    Args:
        loss: "softmax", "sampled_softmax", "bce", "gbce" or "bpr".
        negatives: K, at least 1; below V with "gbce".
        t: calibration of "gbce", in [0, 1].
        log_q: correct "sampled_softmax" for the draw's probabilities.
        sampling: "uniform", or "popularity" in the training part, which needs `bind`.
        negatives_per: "sequence", which holds N x K x D values, or "position", as in the papers,
            which holds P x K x D.
        last_only: predict the last item of the window from those before it, with any encoder, by
            `encode`; all positions need a causal one.

    Raises:
        InputError: an unknown name, a number out of range, `log_q` with another loss, an encoder
            that is not causal, or "popularity" when not bound.

    Source:
        "bce": Kang and McAuley, SASRec, ICDM 2018, divided by K + 1. "gbce": Petrov and Macdonald,
        gSASRec, RecSys 2023, eq. 10 and 14. `log_q`: Bengio and Senécal, 2008. "bpr": Rendle et
        al., UAI 2009, whose regulariser is the optimiser's weight decay here.
    """

    loss: str = "softmax"
    negatives: int = 256
    t: float = 0.75
    log_q: bool = False
    sampling: str = "uniform"
    negatives_per: str = "sequence"
    last_only: bool = False
    log_popularity: Tensor | None = dataclasses.field(default=None, repr=False, compare=False)

    lookahead = 1
    needs = "a next item"

    def __post_init__(self) -> None:
        for name, choices in (
            ("loss", LOSSES),
            ("sampling", ("uniform", "popularity")),
            ("negatives_per", ("position", "sequence")),
        ):
            check_choice(f"NextItem: {name}", getattr(self, name), choices)
        check_count("NextItem: negatives", self.negatives)
        check_unit("NextItem: t", self.t)
        if self.log_q and self.loss != "sampled_softmax":
            raise InputError(f"NextItem: log_q corrects 'sampled_softmax', not {shown(self.loss)}")

    def __call__(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the loss, 0-dim, of `tokens` (N, T + 1) int64 left-padded with 0.

        0 where no row has two items.
        """
        h, column, row = self.places(model, tokens)
        if not len(h):
            return no_loss(model)
        weight, bias = model.head()
        if self.loss == "softmax":
            return softmax_loss(h, column, weight, bias)
        kept, row = row.unique(return_inverse=True)
        return self._sampled(h, column, row, len(kept), weight, bias, generator)

    def places(self, model: SequenceEncoder, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return h (P, D), and the columns and rows (P,) int64 of the next items, rows ascending.

        `tokens` as in a call.
        """
        if not (self.last_only or model.causal):
            raise InputError(
                f"NextItem needs a causal encoder or last_only=True: {type(model).__name__} sees"
                " at every position the items after it"
            )
        if self.loss == "gbce" and self.negatives >= model.num_items:
            raise InputError(
                f"NextItem: negatives = {self.negatives} must be below the {model.num_items} items"
            )
        row = (tokens[:, :-1] != 0).any(dim=1).nonzero()[:, 0]
        inputs, targets = tokens[row, :-1], tokens[row, 1:]
        valid = (inputs != 0) & (targets != 0)
        if not valid.any():
            return model.head()[0][:0], row[:0], row[:0]
        if self.last_only:
            return model.encode(inputs), targets[:, -1] - model.first_item, row
        h = model.transform(states_by_length(model, inputs)[valid])
        return h, targets[valid] - model.first_item, row[:, None].expand_as(valid)[valid]

    def targets(self, model: SequenceEncoder, tokens: Tensor) -> int:
        """Return P, the number of positions that have a next item."""
        valid = (tokens[:, :-1] != 0) & (tokens[:, 1:] != 0)
        return int(valid[:, -1].sum() if self.last_only else valid.sum())

    def _sampled(
        self,
        h: Tensor,
        column: Tensor,
        row: Tensor,
        rows: int,
        weight: Tensor,
        bias: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the loss of h (P, D) with next items `column` (P,), of sequences `row` (P,)."""
        by_row = self.negatives_per == "sequence"
        drawn, log_q = self._draw(rows if by_row else len(h), weight.shape[0], generator)
        drawn, log_q = drawn.to(h.device), log_q.to(weight)
        vectors = F.embedding(drawn, weight)
        if by_row:
            # One product for all positions of a sequence; `place` is where each stands in it.
            first = torch.searchsorted(row, torch.arange(rows, device=row.device))
            place = torch.arange(len(row), device=row.device) - first[row]
            grid = h.new_zeros(rows, int(place.max()) + 1, h.shape[1])
            grid = grid.index_put((row, place), h)
            scores = (grid @ vectors.transpose(1, 2))[row, place]
            drawn, log_q = drawn[row], log_q[row]
        else:
            scores = (vectors @ h.unsqueeze(2)).squeeze(2)
        positive = (h * F.embedding(column, weight)).sum(dim=1)
        scores = scores.to(weight.dtype)  # autocast makes the products half precision
        if bias is not None:
            scores, positive = scores + bias[drawn], positive + bias[column]
        hit = drawn == column[:, None]
        if self.loss == "sampled_softmax":
            if self.log_q:
                scores = scores - (log_q + math.log(self.negatives))
            scores = scores.masked_fill(hit, -math.inf)
            total = torch.logaddexp(positive, scores.logsumexp(dim=1))
            return (total - positive).mean()
        if self.loss == "bpr":
            pairs = F.softplus(scores - positive[:, None]).masked_fill(hit, 0.0).sum(dim=1)
            return (pairs / (~hit).sum(dim=1).clamp(min=1)).mean()
        alpha = self.negatives / (weight.shape[0] - 1) if self.loss == "gbce" else 1.0
        beta = 1 - self.t * (1 - alpha)
        wrong = F.softplus(scores).masked_fill(hit, 0.0).sum(dim=1)
        return ((beta * F.softplus(-positive) + wrong) / (1 + (~hit).sum(dim=1))).mean()

    def _draw(self, rows: int, items: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`rows` x K columns in 0..V-1 int64, and the logarithm of each one's probability."""
        shape = (rows, self.negatives)
        if self.sampling == "uniform":
            log_q = torch.full(shape, -math.log(items), dtype=torch.float64)
            return torch.randint(items, shape, generator=generator), log_q
        if self.log_popularity is None:
            raise InputError("NextItem with sampling='popularity' must be bound to the data")
        ends = self.log_popularity.exp().cumsum(0)
        draws = torch.rand(shape, generator=generator, dtype=torch.float64) * ends[-1]
        drawn = torch.searchsorted(ends, draws, right=True).clamp(max=items - 1)
        return drawn, self.log_popularity[drawn]

    def bind(self, data: TrainingSequences, max_len: int) -> NextItem:
        """With the items' shares of all users' training parts; 8 V bytes."""
        if self.sampling == "uniform":
            return self
        counts = data.popularity()
        shares = torch.from_numpy(counts / max(1, counts.sum()))
        return dataclasses.replace(self, log_popularity=shares.log())
