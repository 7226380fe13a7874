"""Ranks of the held-out items: leave-one-out evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherkern import processes
from fisherkern.adapters.sharded import sharded_fingerprint
from fisherkern.checks import check_count, takes_numpy
from fisherkern.data import SequenceDataset
from fisherkern.data.batching import HistoryBatches
from fisherkern.errors import InputError, shown
from fisherkern.evaluation.candidates import sample_negatives
from fisherkern.evaluation.report import Protocol, Report
from fisherkern.evaluation.scorer import Scorer
from fisherkern.evaluation.scores import NaNScoreError, Scores
from fisherkern.modes import eval_mode
from fisherkern.progress import progress_bar


@takes_numpy
def evaluate(
    model: Any,
    data: SequenceDataset,
    *,
    split: str = "test",
    k: int | Sequence[int] = (5, 10, 20),
    candidates: str = "full",
    seen: str = "exclude",
    batch_size: int = 256,
    max_scores: int = 2**25,
    seed: int = 0,
    users: np.ndarray | Sequence[int] | None = None,
    progress: bool = False,
) -> Report:
    """Rank every user's held-out item: leave-one-out evaluation.

        rank = 1 + #{candidates, the target left out, that score at least as high}
        HR@k = [rank <= k],  NDCG@k = [rank <= k] / log2(1 + rank),  MRR@k = [rank <= k] / rank

    averaged over users; ties count against the model. Scores are fp32, or fp64 where the model's
    are. Of a model in half precision, or under autocast, the product with the output layer is done
    in fp32, so that no ties come of rounding, where `fisherkern.adapt` finds that layer. Its logits
    are widened otherwise. Where `torch.distributed` is initialised, every process calls this with
    the same arguments, ranks its share of the batches and gets the whole report. Of a model whose
    item table is a `DTensor` with its rows over the processes each counts, of all batches, its own
    items.

    Args:
        model: A model of any library, as it is or adapted, or a function. Plain modules and
            functions are called on {"history": (N, T), "target": (N,), "user": (N,)} int64, and
            give scores (N, V_out); column c is item c + model.first_item (0 without that
            attribute). T = model.max_len, 50 without. Libraries' models get batches of their
            own. In eval mode meanwhile, its modes restored after.
        data: the sequences. The model's items are found by their ids; of a model without ids,
            item i is taken to be the data's i-th item.
        split: "test" (the last item of every user), "validation" (the last but one) or "train"
            (the last but two).
        k: cut-off or cut-offs, positive integers.
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
        users: (n,) indices of the users to evaluate; None: all. Users without a history in the
            split are left out, and `report.users` says who is in.
        progress: show a progress bar.

    Returns:
        The means over users by name, report["ndcg@10"], with every user's values and ranks.

    Raises:
        InputError: an unknown split, candidates or seen, a NaN score, scores that do not cover the
            catalogue, a model of another catalogue, users that are unknown, named twice or all
            without a history, or a user with fewer than 100 unseen items to draw.

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
        protocol = Protocol(split, candidates, seen, seed, data.fingerprint())
        cutoffs = _cutoffs(k)
        check_count("max_scores", max_scores)
        scorer = Scorer(model, data, max_scores)
        chosen = np.arange(data.num_users) if users is None else np.asarray(users)
        view = data if users is None else data.subset(chosen)
        if len(np.unique(chosen)) != len(chosen):
            raise InputError("users: an index occurs twice")
        loader = view.loader(split=split, batch_size=batch_size, max_len=scorer.max_len)
        if processes.world() > 1:
            same |= {"protocol": protocol, "k": cutoffs, "batch_size": batch_size}
            same |= {"max_scores": max_scores, "users": chosen.tobytes()}
            same["model"] = None if scorer.module is None else sharded_fingerprint(scorer.module)
    show = progress and processes.rank() == 0
    with torch.no_grad(), eval_mode(scorer.module):
        ranks = _dealt_ranks(scorer, loader, chosen, data, protocol, show)
    return Report(
        per_user=metrics_at(ranks, cutoffs),
        users=chosen[loader.user],
        ranks=ranks,
        protocol=protocol,
    )


def _dealt_ranks(
    scorer: Scorer,
    loader: HistoryBatches,
    chosen: np.ndarray,
    data: SequenceDataset,
    protocol: Protocol,
    show: bool,
) -> np.ndarray:
    """Return the ranks of all the loader's users, of whose batches this process takes its own.

    Of a model whose items are shared out, every process takes all.
    """
    popularity = data.popularity()
    ranks = torch.zeros(len(loader.user), dtype=torch.int64)
    own: Sequence[int] = range(len(loader))
    if not scorer.sharded:
        own = processes.own_numbers(loader.lengths())
    with processes.together():
        for number in progress_bar(own, desc="evaluate", unit="batch", show=show):
            batch = loader[number]
            batch["user"] = torch.from_numpy(chosen[batch["user"].numpy()])
            found = torch.cat(_batch_ranks(scorer, batch, data, protocol, popularity))
            ranks[number * loader.batch_size :][: len(found)] = found
    return (ranks if scorer.sharded else processes.joined_sum(ranks)).numpy()


def metrics_at(ranks: np.ndarray, cutoffs: tuple[int, ...]) -> dict[str, np.ndarray]:
    """HR@k, NDCG@k and MRR@k of every user from the rank of its one relevant item.

    hr = [rank <= k], ndcg = [rank <= k] / log2(1 + rank), mrr = [rank <= k] / rank.
    ranks (N,) int64 from 1; returns {"hr@k": (N,) float64, ...} in the order of the cut-offs.
    """
    gains = {
        "hr": np.ones(len(ranks)),
        "ndcg": 1 / np.log2(1.0 + ranks),
        "mrr": 1 / ranks.astype(np.float64),
    }
    return {f"{name}@{k}": gain * (ranks <= k) for k in cutoffs for name, gain in gains.items()}


def _batch_ranks(
    scorer: Scorer,
    batch: dict[str, Tensor],
    data: SequenceDataset,
    protocol: Protocol,
    popularity: np.ndarray,
) -> list[Tensor]:
    """Return the ranks of a batch's targets, part by part; scores are let go one after another."""
    found = []
    for part in scorer.parts(batch):
        try:
            ranks = _ranks(scorer.scores(part), part, data, protocol, popularity)
        except NaNScoreError as error:
            user = int(part["user"][error.row])
            raise InputError(f"model: a score of user number {user} is NaN") from None
        found.append(ranks.cpu())
    return found


def _ranks(
    scores: Scores,
    batch: dict[str, Tensor],
    data: SequenceDataset,
    protocol: Protocol,
    popularity: np.ndarray,
) -> Tensor:
    target = batch["target"].to(scores.device)
    if protocol.candidates == "full" and protocol.seen == "keep":
        return scores.full_ranks(target, None)
    users = batch["user"].numpy()
    if protocol.candidates == "full":
        seen = seen_pairs(data, users, protocol.split, protocol.last)
        row, item = (torch.from_numpy(own).to(scores.device) for own in seen)
        return scores.full_ranks(target, (row, item))
    forbidden = never_drawn(data, users, batch["target"].numpy(), protocol.split)
    drawn = sample_negatives(protocol.candidates, users, forbidden, popularity, protocol.seed)
    return scores.sampled_ranks(target, torch.from_numpy(drawn).to(scores.device))


def seen_pairs(
    data: SequenceDataset, users: np.ndarray, split: str, last: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(Index in `users`, item) of what each has had, in the `last` places if given."""
    indptr, item = data.seen(users, split, last)
    return np.repeat(np.arange(len(users)), np.diff(indptr)), item


def never_drawn(
    data: SequenceDataset, users: np.ndarray, target: np.ndarray, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """(Index in `users`, item) of what is no sampled candidate: what they have had, and targets."""
    row, item = seen_pairs(data, users, split)
    return np.concatenate([row, np.arange(len(users))]), np.concatenate([item, target])


def _cutoffs(k: int | Sequence[int]) -> tuple[int, ...]:
    cutoffs = (k,) if isinstance(k, int) else tuple(k)
    if not cutoffs or any(int(cutoff) != cutoff or cutoff < 1 for cutoff in cutoffs):
        raise InputError(f"k: expected positive integers, got {shown(k)}")
    return tuple(dict.fromkeys(int(cutoff) for cutoff in cutoffs))
