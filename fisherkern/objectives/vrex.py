"""V-REx: a risk that is the same in every environment, such as rare and popular items."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherkern.checks import check_choice, check_count, check_not_negative
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError, shown
from fisherkern.objectives.base import (
    OverObjective,
    Term,
    TrainingSequences,
    no_loss,
    total_loss,
)
from fisherkern.objectives.masked_items import MaskedItems
from fisherkern.objectives.next_item import NextItem
from fisherkern.objectives.scoring import LOCAL_SLICE, softmax_loss
from fisherkern.processes import joined_sum, world


@dataclasses.dataclass(frozen=True)
class VREx(OverObjective):
    """Another objective plus `weight` times the variance of its risks between environments.

        L + weight/|E| Σ_e (R_e - mean_e R_e)²

    with L the objective's mean over the targets of a batch, R_e the mean over those in environment
    e, and E the environments that have targets in the batch. Environments are of popularity n_v,
    item v's training actions, and hold nearly equal parts of them:

        "target"    by n_v of the target's item, as many training actions in each
        "sequence"  by the mean of log n_v over a window's items, as many training users in each

    Environments of few targets have noisy risks, and noise adds to the variance. The encoder runs
    once, whatever the number of environments; every environment holds what `softmax_loss` says.

    Args:
        objective: `NextItem` with its full softmax, or `MaskedItems`. Add others to the result;
            `RepPad` goes around it.
        weight: of the variance.
        by: "target" or "sequence".
        environments: |E|, at least 2.

    Raises:
        InputError: another objective, a number out of range, data whose popularity leaves an
            environment without training actions or users, or an objective that is not bound.

    Source:
        Krueger et al., Out-of-Distribution Generalization via Risk Extrapolation, ICML 2021.
        Environments after Zhao et al., CausalDiffRec, arXiv 2408.00490, which makes them by editing
        a graph; popularity is ours.
    """

    objective: NextItem | MaskedItems
    weight: float = 0.1
    by: str = "target"
    environments: int = 3
    log_popularity: Tensor | None = dataclasses.field(default=None, repr=False, compare=False)
    bounds: Tensor | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        inner = self.objective
        if not isinstance(inner, NextItem | MaskedItems):
            raise InputError(f"VREx: objective must be NextItem or MaskedItems, got {shown(inner)}")
        if isinstance(inner, NextItem):
            check_choice("VREx: the loss of NextItem", inner.loss, ("softmax",))
        check_not_negative("VREx: weight", self.weight)
        check_choice("VREx: by", self.by, ("target", "sequence"))
        check_count("VREx: environments", self.environments, least=2)

    def __call__(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the loss, 0-dim, of windows (N, T + lookahead) int64 left-padded with 0."""
        return total_loss(self.terms(model, tokens, generator))

    def terms(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> list[Term]:
        """Return L with its targets, and the variance with the environments that have some."""
        if self.log_popularity is None or self.bounds is None:
            raise InputError("VREx must be bound: objective.bind(data, max_len)")
        if isinstance(self.objective, NextItem):
            h, column, row = self.objective.places(model, tokens)
        else:
            h, column, row = self.objective.places(model, tokens, generator)
        if not len(h):
            return [Term(no_loss(model), 0), Term(no_loss(model), 0, self.weight)]
        popularity = self.log_popularity.to(tokens.device)
        score = popularity[column + model.first_item]
        if self.by == "sequence":
            total = popularity[tokens].sum(dim=1)  # 0 at padding
            score = (total / (tokens != 0).sum(dim=1).clamp(min=1))[row]
        place = torch.bucketize(score, self.bounds.to(score), right=True)
        present, counts = place.unique(return_counts=True)
        weight, bias = model.head()
        risks = torch.stack(
            [softmax_loss(h[place == e], column[place == e], weight, bias) for e in present]
        )
        # Of several processes each has its share of a risk; the variance is that of the whole.
        whole = risks.detach()
        if LOCAL_SLICE.get() is not None:
            whole = joined_sum(whole) / world()
        gap = whole - whole.mean()
        variance = gap.square().mean() + 2 / len(gap) * (gap * (risks - risks.detach())).sum()
        loss = (risks * counts).sum() / len(h)
        return [Term(loss, len(h)), Term(variance, len(risks), self.weight)]

    def bind(self, data: TrainingSequences, max_len: int) -> VREx:
        """With the items' popularity and the bounds between environments; 8 V bytes."""
        logs, cuts = log_popularity(data), np.arange(1, self.environments) / self.environments
        if self.by == "target":
            counts = data.popularity()
            order = np.argsort(counts, kind="stable")
            scores = logs[1:][order].repeat(counts[order])
        else:
            scores = np.sort(mean_log_popularity(data)[data.train_ends > data.offsets[:-1]])
        score = scores[(cuts * len(scores)).astype(int)] if len(scores) else scores
        filled = len(np.unique(np.searchsorted(score, scores, side="right")))
        if filled < self.environments:
            raise InputError(
                f"VREx: environments = {self.environments}, but the popularity of these data tells"
                f" only {filled} apart by {self.by}"
            )
        return dataclasses.replace(
            self,
            objective=self.objective.bind(data, max_len),
            log_popularity=torch.from_numpy(logs),
            bounds=torch.from_numpy(score),
        )


def log_popularity(data: TrainingSequences) -> NDArray[np.float64]:
    """(V + 1,) float64: log n_v at v, n_v the training actions of item v, at least 1."""
    return np.log(np.maximum(np.append(1, data.popularity()), 1))


def mean_log_popularity(data: TrainingSequences) -> NDArray[np.float64]:
    """(users,) float64: the mean of log n_v over each user's training items; 0 without any."""
    lengths = np.diff(data.offsets)
    user = np.repeat(np.arange(len(lengths)), lengths)
    train = np.arange(len(user)) < np.repeat(data.train_ends, lengths)
    values = log_popularity(data)[data.items[train]]
    total = np.bincount(user[train], values, minlength=len(lengths))
    return total / np.maximum(data.train_ends - data.offsets[:-1], 1)
