"""Successive targets, coverage, debiased NDCG and popularity, against loops over lists."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import fisherkern as fk
from fisherkern.errors import InputError
from fisherkern.evaluation.scores import TiledScores, WholeScores, top_columns

V = 31


@pytest.fixture(scope="module")
def data():
    return fk.synthetic(num_users=40, num_items=V, clusters=4, min_length=3, max_length=14, seed=2)


class Hashed(nn.Module):
    """Scores of the history alone, with many ties and some -inf."""

    first_item = 1

    def forward(self, batch):
        item = torch.arange(1, V + 1)
        mixed = (batch["history"].sum(1)[:, None] * 31 + item * item * 7) % 23
        return mixed.float().masked_fill(mixed == 5, -torch.inf)


def score(history, item):
    mixed = (sum(history[-50:]) * 31 + item * item * 7) % 23
    return -math.inf if mixed == 5 else float(mixed)


def ranked(data, split, seen="exclude"):
    """(User, rank, list) of every target, by loops."""
    users, positions = data.targets(split)
    for user, position in zip(users.tolist(), positions.tolist(), strict=True):
        history = data.items[data.offsets[user] : position].tolist()
        target = int(data.items[position])
        left_out = set(history) if seen == "exclude" else set()
        own = score(history, target)
        rank = 1 + sum(
            score(history, v) >= own for v in range(1, V + 1) if v != target and v not in left_out
        )
        listed = [v for v in range(1, V + 1) if v not in left_out and score(history, v) > -math.inf]
        listed.sort(key=lambda v: (-score(history, v), v))
        yield user, rank, listed


@pytest.mark.parametrize("targets", ["last", "successive"])
@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("seen", ["exclude", "keep"])
@pytest.mark.parametrize("max_scores", [2**25, 5 * V])
def test_all_metrics_are_those_of_loops(data, targets, split, seen, max_scores):
    data = data.split_by_time(0.7, targets=targets)
    expected = list(ranked(data, split, seen))
    metrics = ("hr", "ndcg", "mrr", "debiased-ndcg", "coverage")
    report = fk.evaluate(
        Hashed(),
        data,
        split=split,
        seen=seen,
        k=(3, 10, 999),
        metrics=metrics,
        batch_size=7,
        max_scores=max_scores,
    )
    assert report.users.tolist() == [user for user, _, _ in expected]
    assert report.ranks.tolist() == [rank for _, rank, _ in expected]
    train = [
        int(v)
        for user in range(data.num_users)
        for v in data.items[data.offsets[user] : data.train_ends[user]]
    ]
    _, positions = data.targets(split)
    weights = [1 / math.sqrt(max(train.count(int(data.items[p])), 1)) for p in positions]
    for k in (3, 10, 999):
        ndcg = [(rank <= k) / math.log2(1 + rank) for _, rank, _ in expected]
        debiased = sum(w * own for w, own in zip(weights, ndcg, strict=True)) / sum(weights)
        assert report[f"ndcg@{k}"] == pytest.approx(sum(ndcg) / len(ndcg), rel=1e-12)
        assert report[f"debiased-ndcg@{k}"] == pytest.approx(debiased, rel=1e-12)
        listed = {v for _, _, own in expected for v in own[:k]}
        assert report[f"coverage@{k}"] == len(listed) / V
    users = len({user for user, _, _ in expected})
    assert report.num_users == users and report.to_json()["num_targets"] == len(expected)
    targets_told = f"{users} users, {len(expected)} targets" in report.table()
    assert targets_told == (users < len(expected))
    assert f"{split} split, global time split at quantile 0.7" in report.table()


def test_metrics_that_are_not_asked_for_are_not_there(data):
    assert list(fk.evaluate(Hashed(), data, k=10)) == ["hr@10", "ndcg@10", "mrr@10"]
    both = fk.evaluate(Hashed(), data, k=10, metrics=("coverage", "ndcg"))
    assert list(both) == ["ndcg@10", "coverage@10"] and len(both) == 2
    assert list(fk.compare(both, both)) == ["ndcg@10"]
    assert dict(fk.evaluate(Hashed(), data, k=10, metrics=("coverage", "hr")))["coverage@10"] > 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"metrics": ("recall",)}, "metrics must be 'hr' or"),
        ({"metrics": ()}, "metrics: none was named"),
        ({"metrics": None}, "metrics must be 'hr' or"),
        (
            {"metrics": ("coverage",), "candidates": "uniform-100"},
            "metrics: coverage is of a full ranking, not of uniform-100",
        ),
    ],
)
def test_bad_metrics_are_named(data, how, message):
    with pytest.raises(InputError, match=message):
        fk.evaluate(Hashed(), data, **how)


def test_what_is_impossible_or_seen_is_in_no_list(data):
    class Rising(nn.Module):
        first_item = 1

        def forward(self, batch):
            scores = torch.arange(V).double().where(torch.arange(V) % 3 > 0, -torch.inf)
            return scores.expand(len(batch["history"]), -1)

    for seen, had in (("keep", set()), ("exclude", set(data.sequence(5)[:-1].tolist()))):
        expected = sum(v % 3 > 0 and v + 1 not in had for v in range(V))
        report = fk.evaluate(
            Rising(), data, users=[5], k=(99, V), metrics=["coverage", "hr"], seen=seen
        )
        assert report["coverage@99"] == report[f"coverage@{V}"] == expected / V


@pytest.mark.parametrize("items", [1, 257, 2100])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_lists_do_not_depend_on_tiles(items, k):
    generator = torch.Generator().manual_seed(items)
    h = torch.randint(-1, 2, (3, 4), generator=generator).double()
    weight = torch.randint(-1, 2, (items, 4), generator=generator).double()  # ties
    pairs = (torch.tensor([0, 2, 2]), torch.tensor([1, 1, items]))
    z = h @ weight.t()
    for excluded in (None, pairs):
        left = z.clone()
        if excluded is not None:
            left[excluded[0], excluded[1] - 1] = -torch.inf
        expected = [sorted(range(items), key=lambda v: (-row[v], v))[:k] for row in left.tolist()]
        for scores in (WholeScores(z), TiledScores(h, weight, None, 0, items, 130 * 3)):
            found, best = scores.top(k, excluded)
            assert found.tolist() == [sorted(v + 1 for v in row) for row in expected]
            assert torch.equal(best, left.gather(1, found - 1))


def test_top_columns_table():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [1.0, -torch.inf, 2.0, 1.0]])
    assert top_columns(scores, 2)[0].tolist() == [[1, 3], [0, 1], [0, 2]]
    assert top_columns(scores, 9)[0].tolist() == [[0, 1, 2, 3]] * 3


def test_the_interval_of_several_targets_takes_users_for_clusters(data):
    data = data.split_by_time(0.6, targets="successive")
    a = fk.evaluate(Hashed(), data, k=10)
    b = fk.evaluate(fk.Popularity(data), data, k=10)
    d = (a.per_user["ndcg@10"] - b.per_user["ndcg@10"]).tolist()
    mean, sums = sum(d) / len(d), {}
    for user, own in zip(a.users.tolist(), d, strict=True):
        sums[user] = sums.get(user, 0.0) + own - mean
    n = len(sums)
    error = math.sqrt(n / (n - 1) * sum(own**2 for own in sums.values())) / len(d)
    found = fk.compare(a, b)
    assert (found.num_users, found["ndcg@10"].mean) == (n, pytest.approx(mean, rel=1e-12))
    assert found["ndcg@10"].standard_error == pytest.approx(error, rel=1e-12)
    assert len(d) > n
    with pytest.raises(InputError, match="differ in data_fingerprint|differ in holdout"):
        fk.compare(a, fk.evaluate(Hashed(), data.split_by_time(0.6), k=10))


@pytest.mark.parametrize("ticks", [1, 10**3, 10**6, 10**9])
def test_popularity_counts_what_a_loop_counts(data, ticks):
    data = fk.SequenceDataset(
        "made", data.items, data.offsets, data.item_ids, data.user_ids, times=data.times * ticks
    ).split_by_time(0.7)
    end = max(data.times[data.offsets[u] : s].max(initial=0) for u, s in enumerate(data.train_ends))
    for days in (None, 7, 30.5):
        counts = [0] * V
        for user, stop in enumerate(data.train_ends):
            for place in range(data.offsets[user], stop):
                if days is None or data.times[place] > end - days * 86_400 * ticks:
                    counts[data.items[place] - 1] += 1
        model = fk.Popularity(data, days=days)
        scores = model({"history": torch.zeros(2, 5)})
        assert scores.dtype == torch.float64 and scores.tolist() == [counts, counts]
        report = fk.evaluate(model, data, k=10, max_scores=3 * V)
        user, position = (own.tolist() for own in data.targets("test"))
        for u, p, rank in zip(user, position, report.ranks.tolist(), strict=True):
            had = set(data.items[data.offsets[u] : p].tolist())
            target = int(data.items[p])
            ahead = [v for v in range(1, V + 1) if v != target and v not in had]
            assert rank == 1 + sum(counts[v - 1] >= counts[target - 1] for v in ahead)


@pytest.mark.parametrize(
    ("times", "days", "message"),
    [
        (None, 7, "made: its actions have no times, which days=7 needs"),
        ([1, 2, 3, 4], 7, "made: its times, 1 to 2, are not seconds since 1970"),
        ([10**9, 10**9, 10**12, 10**12], 0, "days must be positive"),
        ([10**9, 10**12, 10**12, 10**12], 7, "are not seconds since 1970"),
    ],
)
def test_popularity_refuses_times_that_it_cannot_read(times, days, message):
    data = fk.SequenceDataset("made", [1, 2, 1, 2], [0, 4], ["a", "b"], ["x"], times=times)
    with pytest.raises(InputError, match=message):
        fk.Popularity(data, days=days)
    assert fk.Popularity(data).counts.tolist() == [1, 1]


def test_a_report_of_some_users_in_another_order(data):
    data = data.split_by_time(0.7, targets="successive")
    whole = fk.evaluate(Hashed(), data, k=10)
    chosen = np.unique(whole.users)[::-2].tolist()
    assert len(chosen) > 4
    part = fk.evaluate(Hashed(), data, k=10, users=chosen, batch_size=4)
    expected = [
        (u, r) for c in chosen for u, r in zip(whole.users, whole.ranks, strict=True) if u == c
    ]
    assert list(zip(part.users, part.ranks, strict=True)) == expected
    assert np.all(np.isin(part.users, chosen))
