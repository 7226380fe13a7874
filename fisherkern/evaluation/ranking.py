"""Ranks of the held-out items, and metrics of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherkern import processes
from fisherkern.adapters.sharded.models import sharded_fingerprint
from fisherkern.checks import MOST, check_choice, check_count, takes_numpy
from fisherkern.data import SequenceDataset
from fisherkern.data.batching import HistoryBatches
from fisherkern.errors import InputError, shown
from fisherkern.evaluation.candidates import sample_negatives
from fisherkern.evaluation.report import Protocol, Report
from fisherkern.evaluation.scorer import Scorer
from fisherkern.evaluation.scores import ItemPairs, NaNScoreError, Scores, top_columns
from fisherkern.modes import eval_mode
from fisherkern.progress import progress_bar

METRICS = ("hr", "ndcg", "mrr")
MORE_METRICS = ("debiased-ndcg", "coverage")
PROPENSITY_POWER = 0.5


@takes_numpy
def evaluate(
    model: Any,
    data: SequenceDataset,
    *,
    split: str = "test",
    k: int | Sequence[int] = (5, 10, 20),
    metrics: Sequence[str] = METRICS,
    candidates: str = "full",
    seen: str = "exclude",
    batch_size: int = 256,
    max_scores: int = 2**25,
    seed: int = 0,
    users: np.ndarray | Sequence[int] | None = None,
    progress: bool = False,
) -> Report:
    """Rank every user's held-out items: leave-one-out evaluation, or that of another split.

        rank = 1 + #{candidates, the target left out, that score at least as high}
        HR@k = [rank <= k],  NDCG@k = [rank <= k] / log2(1 + rank),  MRR@k = [rank <= k] / rank

    averaged over users, or over targets where users have several; ties count against the model.
    Asked for, NDCG without the advantage of popular items, by self-normalised inverse propensities,

        debiased NDCG@k = Σ_i NDCG@k_i / ρ_i / Σ_i 1 / ρ_i,  ρ_i = max(n_i, 1)^(1/2)

    with n_i the training actions of target i's item, and the share of the catalogue that is in
    anybody's first k, Coverage@k = |∪_i first k of i| / V. These lists are those of a model that
    knows no target: seen items are left out as `seen` says, and of equal scores the first items are
    taken.

    Scores are fp32, or fp64 where the model's are. Of a model in half precision, or under autocast,
    the product with the output layer is done in fp32, so that no ties come of rounding, where
    `fisherkern.adapt` finds that layer. Its logits are widened otherwise. Where `torch.distributed`
    is initialised, every process calls this with the same arguments, ranks its share of the batches
    and gets the whole report. Of a model whose item table is a `DTensor` with its rows over the
    processes each counts, of all batches, its own items.

    Args:
        model: A model of any library, as it is or adapted, or a function. Plain modules and
            functions are called on {"history": (N, T), "target": (N,), "user": (N,)} int64, and
            give scores (N, V_out); column c is item c + model.first_item (0 without that
            attribute). T = model.max_len, 50 without. Libraries' models get batches of their
            own. In eval mode meanwhile, its modes restored after; of a function the modules that it
            refers to.
        data: the sequences. The model's items are found by their ids; of a model without ids,
            item i is taken to be the data's i-th item.
        split: "test" (the last item of every user), "validation" (the last but one) or "train"
            (the last but two); after `data.split_by_time` those of its parts.
        k: cut-off or cut-offs, positive integers.
        metrics: of "hr", "ndcg", "mrr", "debiased-ndcg" and "coverage" (of a full ranking).
        candidates: "full" (the whole catalogue), "uniform-100" or "popular-100" (100 draws,
            fixed by the seed and the user), "top-popular-100" (the 100 most popular). Sampled
            candidates are never items of the user's history.
        seen: what a full ranking leaves out: "exclude" the items of the user's whole history (but
            not the target), "keep" none of them, as DuoRec's code, "last-N" the items of the last
            N places of the history, as EMKD's code with N = T - 1.
        batch_size: users whose histories are encoded at once.
        max_scores: scores held at once, at most, but for two sequences'. A batch of fewer is scored
            by the model itself. Of a larger one the output layer's product is done by item tiles
            of a few megabytes; where that layer is not found, the batch is cut to what fits.
        seed: of the drawn candidates.
        users: (n,) indices of the users to evaluate; None: all. Users without a target or a history
            in the split are left out, and `report.users` says who is in.
        progress: show a progress bar.

    Returns:
        The means by name, report["ndcg@10"], with every user's values and ranks.

    Raises:
        InputError: an unknown split, candidates, seen or metric, a NaN score, scores that do not
            cover the catalogue, a model of another catalogue, users that are unknown, named twice
            or all without a history, or a user with fewer than 100 unseen items to draw.

    Source:
        Yang et al., Unbiased Offline Recommender Evaluation for Missing-Not-At-Random Implicit
        Feedback, RecSys 2018, for the estimate; Saito et al., Unbiased Recommender Learning from
        Missing-Not-At-Random Implicit Feedback, WSDM 2020, for the power of the popularity.

    Examples:
        A model that scores every item by its popularity:

        >>> import torch
        >>> import fisherkern as fk
        >>> data = fk.synthetic(num_users=50, num_items=30, seed=0)
        >>> scores = torch.from_numpy(data.popularity()).float()
        >>> class Popular(torch.nn.Module):
        ...     first_item = 1
        ...     def forward(self, batch):
        ...         return scores.expand(len(batch["history"]), -1)
        >>> report = fk.evaluate(Popular(), data, k=10)
        >>> sorted(report)
        ['hr@10', 'mrr@10', 'ndcg@10']
        >>> 0 < report["ndcg@10"] < report["hr@10"] < 1
        True
    """
    with processes.together() as same:
        if not isinstance(data, SequenceDataset):
            kind = type(data).__name__
            raise InputError(f"data: expected what fk.load or fk.from_frame gives, got a {kind}")
        protocol = Protocol(split, candidates, seen, seed, data.fingerprint(), data.holdout.name)
        cutoffs, names = _cutoffs(k), _metric_names(metrics, candidates)
        check_count("max_scores", max_scores)
        scorer = Scorer(model, data, max_scores)
        loader = data.loader(
            split=split, batch_size=batch_size, max_len=scorer.max_len, users=users
        )
        chosen = np.arange(data.num_users) if users is None else np.asarray(users)
        if len(np.unique(chosen)) != len(chosen):
            raise InputError("users: an index occurs twice")
        if processes.world() > 1:
            same |= {"protocol": protocol, "k": cutoffs, "batch_size": batch_size}
            same |= {"max_scores": max_scores, "users": chosen.tobytes(), "metrics": names}
            same["model"] = None if scorer.module is None else sharded_fingerprint(scorer.module)
    show = progress and processes.rank() == 0
    listed = tuple(min(cutoff, data.num_items) for cutoff in cutoffs if "coverage" in names)
    ranking = _Ranking(scorer, loader, protocol, data.popularity(), listed)
    with torch.no_grad(), eval_mode(scorer.modes):
        ranks, covered = ranking.dealt(show)
    frequency = ranking.popularity[data.items[loader.target] - 1]
    return Report(
        per_user=metrics_at(ranks, cutoffs, names, frequency),
        users=loader.user,
        ranks=ranks,
        protocol=protocol,
        coverage={
            f"coverage@{cutoff}": float(row.mean())
            for cutoff, row in zip(cutoffs, covered, strict=False)
        },
    )


def metrics_at(
    ranks: np.ndarray,
    cutoffs: tuple[int, ...],
    metrics: Sequence[str] = METRICS,
    frequency: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """HR@k, NDCG@k, MRR@k and debiased NDCG@k of every target from its rank; see `evaluate`.

    ranks (N,) int64 from 1; frequency (N,): how often each target's item trains, for the debiased
    NDCG, whose values have weights of mean 1. Returns {"hr@k": (N,) float64, ...} in the order of
    the cut-offs.
    """
    gains = {
        "hr": np.ones(len(ranks)),
        "ndcg": 1 / np.log2(1.0 + ranks),
        "mrr": 1 / ranks.astype(np.float64),
    }
    if "debiased-ndcg" in metrics:
        assert frequency is not None
        weight = np.maximum(frequency, 1) ** -PROPENSITY_POWER
        gains["debiased-ndcg"] = gains["ndcg"] * (weight / weight.mean())
    return {
        f"{name}@{k}": gain * (ranks <= k)
        for k in cutoffs
        for name, gain in gains.items()
        if name in metrics
    }


@dataclass(frozen=True)
class _Ranking:
    """Ranks of a loader's targets.

    Args:
        scorer: of the model's items.
        loader: the pairs.
        protocol: what is ranked against what.
        popularity: (V,) counts, by which candidates are drawn.
        listed: lengths of the lists whose items are counted.
    """

    scorer: Scorer
    loader: HistoryBatches
    protocol: Protocol
    popularity: np.ndarray
    listed: tuple[int, ...]

    def dealt(self, show: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return all ranks, and (lengths, V) bool, the items in anybody's list of each length.

        This process takes its own batches; of a model whose items are shared out, all of them.
        """
        ranks = torch.zeros(len(self.loader.user), dtype=torch.int64)
        covered = torch.zeros(len(self.listed), len(self.popularity), dtype=torch.int64)
        own: Sequence[int] = range(len(self.loader))
        if not self.scorer.sharded:
            own = processes.own_numbers(self.loader.lengths())
        with processes.together():
            for number in progress_bar(own, desc="evaluate", unit="batch", show=show):
                self._add_batch(number, ranks, covered)
        if not self.scorer.sharded:
            ranks = processes.joined_sum(ranks)
            covered = processes.joined_sum(covered) if self.listed else covered
        return ranks.numpy(), covered.numpy() > 0

    def _add_batch(self, number: int, ranks: Tensor, covered: Tensor) -> None:
        """Fill in the ranks of a batch, part by part; scores are let go one after another."""
        first = number * self.loader.batch_size
        for part in self.scorer.parts(self.loader[number]):
            rows = slice(first, first + len(part["target"]))
            try:
                scores = self.scorer.scores(part)
                excluded = self._excluded(rows, scores.device)
                ranks[rows] = self._ranks(scores, rows, part, excluded).cpu()
            except NaNScoreError as error:
                user = int(part["user"][error.row])
                raise InputError(f"model: a score of user number {user} is NaN") from None
            if self.listed:
                items, best = scores.top(max(self.listed), excluded)
                for row, length in zip(covered, self.listed, strict=True):
                    column, value = top_columns(best, length)
                    named = items.gather(1, column)[value > -torch.inf]
                    row[named.cpu() - 1] = 1
            first = rows.stop

    def _excluded(self, rows: slice, device: torch.device) -> ItemPairs | None:
        """Return what a full ranking leaves out."""
        if self.protocol.candidates != "full" or self.protocol.seen == "keep":
            return None
        row, item = self.loader.seen(rows, self.protocol.last)
        return torch.from_numpy(row).to(device), torch.from_numpy(item).to(device)

    def _ranks(
        self, scores: Scores, rows: slice, batch: dict[str, Tensor], excluded: ItemPairs | None
    ) -> Tensor:
        target = batch["target"].to(scores.device)
        if self.protocol.candidates == "full":
            return scores.full_ranks(target, excluded)
        users, forbidden = batch["user"].numpy(), never_drawn(self.loader, rows)
        kind, seed = self.protocol.candidates, self.protocol.seed
        drawn = sample_negatives(kind, users, forbidden, self.popularity, seed)
        return scores.sampled_ranks(target, torch.from_numpy(drawn).to(scores.device))


def never_drawn(loader: HistoryBatches, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """(Pair, item) of what is no sampled candidate of pairs: what they have had, and targets."""
    row, item = loader.seen(rows)
    target = loader.items[loader.target[rows]]
    return np.concatenate([row, np.arange(len(target))]), np.concatenate([item, target])


def _metric_names(metrics: Sequence[str], candidates: str) -> tuple[str, ...]:
    names: tuple[Any, ...] = tuple(metrics) if _is_list(metrics) else (metrics,)
    for name in names:
        check_choice("metrics", name, METRICS + MORE_METRICS)
    if not names:
        raise InputError("metrics: none was named")
    if "coverage" in names and candidates != "full":
        raise InputError(f"metrics: coverage is of a full ranking, not of {candidates} candidates")
    return names


def _is_list(given: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, str | bytes)


def _cutoffs(k: int | Sequence[int]) -> tuple[int, ...]:
    cutoffs: tuple[Any, ...] = tuple(k) if _is_list(k) else (k,)  # type: ignore[arg-type]
    whole = all(isinstance(cutoff, int | float | np.integer) for cutoff in cutoffs)
    if not (
        cutoffs and whole and all(1 <= cutoff < MOST and cutoff % 1 == 0 for cutoff in cutoffs)
    ):
        raise InputError(f"k: expected positive integers, got {shown(k)}")
    return tuple(dict.fromkeys(int(cutoff) for cutoff in cutoffs))
