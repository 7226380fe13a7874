"""EMKD: parallel networks that teach each other."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fisherkern.checks import (
    check_choice,
    check_count,
    check_not_negative,
    check_positive,
    check_unit,
)
from fisherkern.encoders import ParallelEncoders, SequenceEncoder
from fisherkern.encoders.base import trim_padding
from fisherkern.errors import InputError
from fisherkern.objectives.attributes import AttributeTable
from fisherkern.objectives.base import Objective, TrainingSequences, no_loss

_CHOICES = {
    "similarity": ("cosine", "dot"),
    "contrast": ("joint", "each", "released"),
    "distill": ("sum", "mean"),
    "masking": ("mask", "bert"),
    "attribute_positions": ("all", "masked"),
}
# Logits of one view that are kept for the backward pass; above, they are computed again.
_KEPT = 1 << 24


@dataclasses.dataclass(frozen=True)
class EMKD(Objective):
    """Ensemble modelling with contrastive knowledge distillation.

        L = L_MIP + attribute_weight L_AP + λ (L_ICL + L_CCL) + μ L_KD

    of `ParallelEncoders` f^1..f^N, λ = `contrast_weight`, μ = `distill_weight`. From a sequence s_u
    of n items come M = `views` views s_u^m, each with its own ceil(`ratio` n) items, drawn
    uniformly, hidden ("mask"). H^n(s) (T, D) are what network n scores items with,
    `transform(states(s))`, at all positions; z^n are its logits where an item is hidden.

        L_MIP = Σ_n Σ_m  mean over hidden items y of -log softmax(z^n)[y]
        L_AP  = Σ_n      binary cross-entropy of the attributes of s_u's items, from H^n(s_u)
        L_ICL = Σ_n c(n, n),   L_CCL = Σ_n Σ_{k != n} c(n, k)
        c(n, k) = mean over u of  -log( P / (P + Q) )
            P = Σ_m exp(<H^n(s_u), H^k(s_u^m)> / τ),  Q = Σ_{v != u} exp(<H^n(s_u), H^k(s_v)> / τ)
        L_KD  = Σ_m Σ_{a != b}  mean over hidden items of KL(softmax(z^a / τ) || softmax(z^b / τ))

    with no gradient into the teacher a, v the other sequences of the batch, and <,> the cosine
    (or "dot") of the (T, D) matrices laid out flat, positions of padding left out. L_AP is a mean
    over positions and attributes; `Attributes` says what it leaves out. Each network has
    attribute logits U^n h + c^n of its own; U^n, c^n belong to the objective, made by `bind` for
    `networks` networks of width `dim` from `seed`; `attribute_weight=0` needs neither these nor
    data with attributes.

    The roles of s_u (anchor, attributes), its views (positives, masked
    items) and the batch (negatives), the sums over networks, pairs and views, the stopped gradient
    and τ are the paper's and its code's. Of c the paper's text was not at hand: that P belongs in
    the denominator is from notes on its eq. 12, that the M positives stand in one logarithm from
    the code. Means over sequences and hidden items stand for the paper's sums.

    Encoders without a mask token see padding where an item is hidden, and predict it from the
    state of the column before, which for them is what scores it; to give them something to predict
    from, no network has the first item of a sequence hidden. Networks may be of different kinds.

    Rows of padding alone are left out. Holds (M + 1) N rows' states of every network and
    the logits of all hidden items, of one view at a time where a view has more than 2^24.

    Args:
        views: M, at least 1.
        ratio: share of a sequence's items that a view hides, in (0, 1].
        temperature: τ, positive and finite.
        contrast_weight: λ, 0 or more.
        distill_weight: μ, 0 or more.
        attribute_weight: weight of L_AP, 0 or more.
        similarity: "cosine" or "dot".
        contrast: "joint" is c; "released", the code's, is -log P + log(1 + Q), with no positive
            below and the anchor itself as exp(0); "each" is the mean over m of one InfoNCE with
            that positive each, in the code but not called.
        distill: "sum" is L_KD; "mean", the code's, halves it.
        masking: "mask"; "bert" hides every item with probability `ratio`, and what is hidden is
            the mask token 8 times in 10, a random item once and itself once.
        attribute_positions: "all"; "masked", the code's, are those of the last view.
        padding: let padding's states count in <,>.
        networks: N, of the attribute heads.
        dim: width of each network, of the attribute heads.
        seed: of the attribute heads.

    Raises:
        InputError: an argument out of range, a model that is not `ParallelEncoders`, networks of
            different widths with λ > 0, or heads that are missing or do not fit.

    Source:
        Du et al., SIGIR 2023, arXiv 2304.14668, equations 6 to 19.
    """

    views: int = 8
    ratio: float = 0.15
    temperature: float = 1.0
    contrast_weight: float = 0.1
    distill_weight: float = 0.1
    attribute_weight: float = 1.0
    similarity: str = "cosine"
    contrast: str = "joint"
    distill: str = "sum"
    masking: str = "mask"
    attribute_positions: str = "all"
    padding: bool = False
    networks: int = 3
    dim: int = 64
    seed: int = 0
    table: AttributeTable | None = dataclasses.field(default=None, repr=False, compare=False)
    heads: tuple[nn.Linear, ...] = dataclasses.field(default=(), repr=False, compare=False)

    contiguous = True

    def __post_init__(self) -> None:
        for name in ("views", "networks", "dim"):
            check_count(f"EMKD: {name}", getattr(self, name))
        check_unit("EMKD: ratio", self.ratio, "(0, 1]")
        check_positive("EMKD: temperature", self.temperature)
        for name in ("contrast_weight", "distill_weight", "attribute_weight"):
            check_not_negative(f"EMKD: {name}", getattr(self, name))
        for name, choices in _CHOICES.items():
            check_choice(f"EMKD: {name}", getattr(self, name), choices)

    @classmethod
    def released(cls, temperature: float = 1.0, **changes: Any) -> EMKD:
        """Return the released code's loss: M = 8, λ = 0.01, μ = 0.001, its variants of equations.

        Its temperature is 1 for ML-1M and 0.3 for Beauty and Toys. `changes` are other arguments.
        """
        settings: dict[str, Any] = {
            "contrast_weight": 0.01,
            "distill_weight": 0.001,
            "contrast": "released",
            "distill": "mean",
            "masking": "bert",
            "attribute_positions": "masked",
            "padding": True,
        }
        return cls(temperature=temperature, **{**settings, **changes})

    def __call__(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the loss, 0-dim, of `tokens` (N, T) int64 left-padded with 0."""
        networks = self._networks(model)
        tokens = tokens[(tokens != 0).any(dim=1)]
        if not len(tokens):
            return no_loss(model)
        tokens = tokens if self.padding else trim_padding(tokens)
        hidden, views = self.draw(model, tokens, generator)
        states = model.states(torch.cat([tokens, views.flatten(0, 1)]))
        h = networks.split(networks.transform(states))
        anchors = [own[: len(tokens)] for own in h]
        seen = [own[len(tokens) :].unflatten(0, hidden.shape[:2]) for own in h]
        terms = self._predictions(networks, seen, tokens, hidden)
        if self.contrast_weight:
            terms.append(self.contrast_weight * self._contrast(anchors, seen, tokens))
        if self.attribute_weight:
            at = tokens != 0 if self.attribute_positions == "all" else hidden[-1]
            terms += [
                self.attribute_weight * term for term in self._attributes(anchors, tokens, at)
            ]
        return torch.stack(terms).sum() if terms else no_loss(model)

    def targets(self, model: SequenceEncoder, tokens: Tensor) -> int:
        """Return the number of rows that anything is learnt from.

        A causal encoder is not asked for a first item.
        """
        rows = tokens != 0
        alone = self.contrast_weight or self.attribute_weight or hasattr(model, "mask_token")
        return int((rows.sum(dim=1) >= (1 if alone else 2)).sum())

    def draw(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Which items of `tokens` (N, T) are hidden in each view, (M, N, T) bool, and the views."""
        networks = self._networks(model)
        items = tokens != 0
        allowed = items if hasattr(model, "mask_token") else items & (items.cumsum(dim=1) > 1)
        shape = (self.views, *tokens.shape)
        keys = torch.rand(shape, generator=generator).to(tokens.device)
        everywhere = tokens.expand(shape)
        if self.masking == "bert":
            hidden = (keys < self.ratio) & allowed
            fate = torch.rand(shape, generator=generator).to(tokens.device)
            others = torch.randint(1, networks.num_items + 1, shape, generator=generator)
            changed = torch.where(fate < 0.9, others.to(tokens.device), everywhere)
            changed = changed.masked_fill(fate < 0.8, networks.mask_id)
            return hidden, torch.where(hidden, changed, everywhere)
        # In float64, as Python computes it.
        counts = (items.sum(dim=1).double() * self.ratio).ceil().long()
        counts = counts.minimum(allowed.sum(dim=1))
        order = keys.masked_fill(~allowed, -1.0).argsort(dim=2, descending=True)
        first = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
        hidden = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
        hidden = hidden.scatter(2, order, first.expand(shape))
        return hidden, everywhere.masked_fill(hidden, networks.mask_id)

    def bind(self, data: TrainingSequences, max_len: int) -> EMKD:
        """With the attribute table of `data` and a head for each network.

        Raises InputError if there are no attributes, unless `attribute_weight` is 0.
        """
        if not self.attribute_weight:
            return self
        if not data.attributes:
            raise InputError(
                "EMKD: the data set has no attributes; attribute_weight=0 does without them"
            )
        table = AttributeTable.of(data)
        generator = torch.Generator().manual_seed(self.seed)
        heads = []
        for _ in range(self.networks):
            head = nn.utils.skip_init(nn.Linear, self.dim, table.width)
            nn.init.xavier_uniform_(head.weight, generator=generator)
            nn.init.zeros_(head.bias)
            heads.append(head)
        return dataclasses.replace(self, table=table, heads=tuple(heads))

    def modules(self) -> dict[str, nn.Module]:
        """Return the linear layers of a bound objective."""
        return {f"attributes{index}": head for index, head in enumerate(self.heads)}

    def _networks(self, model: SequenceEncoder) -> ParallelEncoders:
        if not isinstance(model, ParallelEncoders):
            raise InputError(f"EMKD trains ParallelEncoders, got a {type(model).__name__}")
        widths = [network.dim for network in model.networks]
        if self.contrast_weight and len(set(widths)) > 1:
            raise InputError(f"EMKD: contrast_weight > 0 needs networks of one width, got {widths}")
        if self.attribute_weight:
            if not self.heads:
                raise InputError("EMKD must be bound first: objective.bind(data, max_len)")
            if widths != [self.dim] * self.networks:
                raise InputError(
                    f"EMKD: networks = {self.networks} of dim = {self.dim} do not fit "
                    f"the model's, of widths {widths}"
                )
        return model

    def _predictions(
        self, model: ParallelEncoders, seen: Sequence[Tensor], tokens: Tensor, hidden: Tensor
    ) -> list[Tensor]:
        """Return the terms L_MIP + μ L_KD of each view; `seen` are N of (M, rows, T, D)."""
        heads = [network.head() for network in model.networks]
        masked = [hasattr(network, "mask_token") for network in model.networks]
        terms = []
        for m, at in enumerate(hidden):
            column = tokens[at] - model.first_item
            if not len(column):
                continue
            # A causal state scores the item of the next column. None is hidden in the first one.
            h = [
                own[m][at] if mask else own[m][:, :-1][at[:, 1:]]
                for own, mask in zip(seen, masked, strict=True)
            ]
            if len(h) * len(column) * model.num_items > _KEPT:
                terms.append(checkpoint(self._of_view, h, heads, column, use_reentrant=False))
            else:
                terms.append(self._of_view(h, heads, column))
        return terms

    def _of_view(
        self, h: Sequence[Tensor], heads: Sequence[tuple[Tensor, Tensor | None]], column: Tensor
    ) -> Tensor:
        """L_MIP + μ L_KD of one view from N of h (P, D), hiding the items in `column` (P,)."""
        logits = [F.linear(own, weight, bias) for own, (weight, bias) in zip(h, heads, strict=True)]
        loss = torch.stack([F.cross_entropy(own, column) for own in logits]).sum()
        if not self.distill_weight or len(logits) == 1:
            return loss
        halved = 0.5 if self.distill == "mean" else 1.0
        return loss + self.distill_weight * halved * distillation(logits, self.temperature)

    def _contrast(
        self, anchors: Sequence[Tensor], seen: Sequence[Tensor], tokens: Tensor
    ) -> Tensor:
        """L_ICL + L_CCL of N anchors (rows, T, D) and their views (M, rows, T, D)."""
        if not self.padding:
            kept = (tokens != 0)[:, :, None]
            anchors, seen = [own * kept for own in anchors], [own * kept for own in seen]
        # A temperature magnifies what autocast would round.
        with torch.autocast(tokens.device.type, enabled=False):
            dtype = torch.promote_types(anchors[0].dtype, torch.float32)
            flat = [own.to(dtype).flatten(-2) for own in (*anchors, *seen)]
            if self.similarity == "cosine":
                flat = [F.normalize(own, dim=-1) for own in flat]
            first, second = flat[: len(anchors)], flat[len(anchors) :]
            terms = [
                contrastive(anchor, other, views, self.temperature, self.contrast)
                for anchor in first
                for other, views in zip(first, second, strict=True)
            ]
            return torch.stack(terms).sum()

    def _attributes(self, anchors: Sequence[Tensor], tokens: Tensor, at: Tensor) -> list[Tensor]:
        """Return the terms of L_AP from N of (rows, T, D) at the positions `at` (rows, T) bool."""
        assert self.table is not None
        items = tokens[at].cpu()
        known = self.table.known(items)
        if not known.any():
            return []
        labels = self.table.rows(items[known])
        terms = []
        for head, own in zip(self.heads, anchors, strict=True):
            logits = head(own[at][known.to(own.device)])
            terms.append(F.binary_cross_entropy_with_logits(logits, labels.to(logits)))
        return terms


def distillation(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Σ_{a != b} KL(softmax(z_a / τ) || softmax(z_b / τ)), mean over rows, of N of (P, V).

    Teachers a get no gradient. A network is no teacher of its own (that term is 0, and so is its
    gradient), so the sum is over all pairs, and one product of Σ_a p_a with Σ_b log p_b does.
    """
    logs = [F.log_softmax(own / temperature, dim=1) for own in logits]
    with torch.no_grad():
        p = [own.exp() for own in logs]
        entropies = torch.stack([-(own * log).sum() for own, log in zip(p, logs, strict=True)])
    crossed = (functools.reduce(torch.add, p) * functools.reduce(torch.add, logs)).sum()
    return -(crossed + len(logs) * entropies.sum()) / len(logits[0])


def contrastive(
    anchor: Tensor, other: Tensor, views: Tensor, temperature: float, kind: str
) -> Tensor:
    """c(n, k) of `EMKD` from H^n(s) and H^k(s) (N, F) and the views H^k(s^m) (M, N, F)."""
    positive = torch.einsum("nf,mnf->nm", anchor, views) / temperature
    negative = anchor @ other.t() / temperature
    own = torch.eye(len(anchor), dtype=torch.bool, device=anchor.device)
    if kind == "released":
        below = negative.masked_fill(own, 0.0).logsumexp(dim=1)
        return (below - positive.logsumexp(dim=1)).mean()
    negative = negative.masked_fill(own, -math.inf)
    if kind == "joint":
        below = torch.cat([positive, negative], dim=1).logsumexp(dim=1)
        return (below - positive.logsumexp(dim=1)).mean()
    spread = negative[:, None, :].expand(-1, positive.shape[1], -1)
    below = torch.cat([positive[:, :, None], spread], dim=2).logsumexp(dim=2)
    return (below - positive).mean()
