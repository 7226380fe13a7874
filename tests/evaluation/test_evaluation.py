"""Evaluation: ranks against a plain Python loop, literal tables, protocols, bad input."""

import functools
import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

import fisherkern.evaluation.candidates as candidates_module
from fisherkern.data import SequenceDataset, load
from fisherkern.errors import InputError
from fisherkern.evaluation import evaluate
from fisherkern.evaluation.candidates import check_enough, sample_negatives
from fisherkern.evaluation.ranking import metrics_at
from fisherkern.evaluation.scores import full_ranks, sampled_ranks

SAMPLED = ("uniform-100", "popular-100", "top-popular-100")


def random_data(num_users: int, num_items: int, seed: int = 0) -> SequenceDataset:
    """Skewed items with repeats; sequences of 3 to 40, some longer than the models' 8."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 41, size=num_users)
    weights = 1 / np.arange(1, num_items + 1)
    items = random.choice(num_items, size=lengths.sum(), p=weights / weights.sum()) + 1
    names = [f"i{v}" for v in range(num_items)]
    users = [f"u{u}" for u in range(num_users)]
    return SequenceDataset("made", items, np.append(0, lengths.cumsum()), names, users)


class Coarse(nn.Module):
    """Scores that depend on history and user, with many ties; knows what it was called with."""

    max_len = 8

    def __init__(self, num_items: int, first_item: int = 1, extra: int = 0):
        super().__init__()
        self.first_item = first_item
        self.columns = num_items + 1 - first_item + extra
        self.dropout = nn.Dropout(0.5)

    def forward(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        assert batch["history"].shape[1] == self.max_len
        item = torch.arange(self.columns) + self.first_item
        mixed = batch["history"].sum(1)[:, None] * 31 + batch["user"][:, None] * 17 + item * item
        return (mixed % 23).float()


def score_of(data, user, history, item):
    """What `Coarse` gives, in plain Python."""
    return (sum(history[-Coarse.max_len :]) * 31 + user * 17 + item * item) % 23


def parts(data, user, split):
    sequence = data.sequence(user).tolist()
    back = {"train": 3, "validation": 2, "test": 1}[split]
    return sequence[:-back], sequence[-back]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("seen", ["exclude", "keep", "last-1", "last-4"])
@pytest.mark.parametrize(("first_item", "extra"), [(1, 0), (0, 0), (0, 3)])
def test_full_ranks_equal_a_plain_loop(split, seen, first_item, extra):
    data = random_data(53, 37)
    model = Coarse(data.num_items, first_item, extra)
    report = evaluate(model, data, split=split, seen=seen, k=(1, 5), batch_size=16)
    expected_users, expected_ranks = [], []
    for user in range(data.num_users):
        history, target = parts(data, user, split)
        if not history:
            continue
        own = score_of(data, user, history, target)
        places = {"exclude": len(history), "keep": 0, "last-1": 1, "last-4": 4}[seen]
        excluded = history[max(len(history) - places, 0) :]
        rank = 1
        for item in range(1, data.num_items + 1):
            candidate = item != target and item not in excluded
            rank += candidate and score_of(data, user, history, item) >= own
        expected_users.append(user)
        expected_ranks.append(rank)
    assert report.users.tolist() == expected_users
    assert report.ranks.tolist() == expected_ranks
    hits = [float(rank <= 5) for rank in expected_ranks]
    assert report.per_user["hr@5"].tolist() == hits
    assert report["hr@5"] == pytest.approx(sum(hits) / len(hits), abs=1e-15)
    if split == "train":
        assert len(expected_users) < data.num_users  # a user of three items has no history


def test_full_ranks_table():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, -math.inf]])
    for target, expected in [
        ([2, 1, 1], [1, 4, 1]),
        ([3, 4, 4], [3, 4, 4]),
        ([1, 2, 3], [4, 4, 3]),
    ]:
        assert full_ranks(scores, torch.tensor(target), None).tolist() == expected
    excluded = (torch.tensor([0, 0, 1, 2]), torch.tensor([2, 3, 4, 3]))
    # Row 2's own target is among the excluded pairs: it stays.
    assert full_ranks(scores, torch.tensor([4, 1, 3]), excluded).tolist() == [1, 3, 3]


def test_sampled_ranks_table():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5, 0.0], [2.0, 1.0, 1.0, 0.0, 1.0]])
    negatives = torch.tensor([[2, 4], [3, 4]])
    assert sampled_ranks(scores, torch.tensor([3, 2]), negatives).tolist() == [3, 2]
    assert sampled_ranks(scores, torch.tensor([5, 1]), negatives).tolist() == [3, 1]


def test_metrics_table():
    metrics = metrics_at(np.array([1, 2, 3, 5, 6]), (5, 10))
    assert list(metrics) == ["hr@5", "ndcg@5", "mrr@5", "hr@10", "ndcg@10", "mrr@10"]
    table: dict[str, list[float]] = {
        "hr@5": [1, 1, 1, 1, 0],
        "mrr@5": [1, 0.5, 1 / 3, 0.2, 0],
        "ndcg@5": [1, 0.63092975, 0.5, 0.38685281, 0],
        "hr@10": [1, 1, 1, 1, 1],
        "mrr@10": [1, 0.5, 1 / 3, 0.2, 1 / 6],
        "ndcg@10": [1, 0.63092975, 0.5, 0.38685281, 0.35620719],
    }
    for name, values in table.items():
        np.testing.assert_allclose(metrics[name], values, rtol=1e-7)


def test_all_ties_rank_last():
    data = random_data(20, 31)
    report = evaluate(lambda batch: torch.zeros(len(batch["history"]), 32), data, seen="keep")
    assert (report.ranks == 31).all()


def test_columns_that_are_no_items_never_count():
    data = random_data(20, 31)

    def model(batch):
        scores = torch.zeros(len(batch["history"]), 33)  # pad, 31 items, mask
        scores[:, 0] = scores[:, 32] = math.inf
        scores[torch.arange(len(scores)), batch["target"]] = 1
        return scores

    assert (evaluate(model, data).ranks == 1).all()


@pytest.mark.parametrize("kind", SAMPLED)
def test_sampled_ranks_equal_a_plain_loop_and_are_never_worse_than_full(kind):
    data = random_data(60, 220)
    model = Coarse(data.num_items)
    report = evaluate(model, data, candidates=kind, seed=3, k=(1, 5, 20), batch_size=60)
    row = np.arange(60)
    histories = [parts(data, u, "test")[0] for u in range(60)]
    targets = [parts(data, u, "test")[1] for u in range(60)]
    pairs = [(u, item) for u in row for item in [*histories[u], targets[u]]]
    forbidden = (np.array([u for u, _ in pairs]), np.array([item for _, item in pairs]))
    drawn = sample_negatives(kind, row, forbidden, data.popularity(), seed=3)
    for u in row:
        negatives = drawn[u].tolist()
        assert len(set(negatives)) == 100
        assert not set(negatives) & {*histories[u], targets[u]}
        assert min(negatives) >= 1 and max(negatives) <= data.num_items
        own = score_of(data, u, histories[u], targets[u])
        ahead = sum(score_of(data, u, histories[u], item) >= own for item in negatives)
        assert report.ranks[u] == 1 + ahead
    for seen in ("exclude", "keep"):
        full = evaluate(model, data, k=(1, 5, 20), seen=seen)
        for metric in full:
            assert (report.per_user[metric] >= full.per_user[metric]).all(), metric
    assert report["hr@20"] > full["hr@20"]


@pytest.mark.parametrize("kind", ["uniform-100", "popular-100", "top-popular-100"])
@pytest.mark.parametrize("spare", [0, 1])
def test_the_items_there_are_to_draw_are_counted(kind, spare):
    """Of 140 items 30 were never bought; user 7 had some of both kinds, and some twice."""
    popularity = np.array([0] * 30 + [1] * 110)
    taken = [*range(31, 41), *range(1, 6)] if kind == "popular-100" else [*range(1, 41)]
    item = np.array([*taken[spare:], *taken[spare:][-3:], 60, 61])
    row = np.array([1] * (len(item) - 2) + [0, 0])
    call = (kind, np.array([3, 7]), (row, item), popularity)
    check_enough(*call)
    assert len(np.unique(sample_negatives(*call, seed=0)[1])) == 100
    more = (np.append(row, 1), np.append(item, 140)), popularity
    if spare:
        check_enough(kind, np.array([3, 7]), *more)
        return
    for check in (check_enough, functools.partial(sample_negatives, seed=0)):
        with pytest.raises(InputError, match="user number 7 has 99"):
            check(kind, np.array([3, 7]), *more)


@pytest.mark.parametrize("kind", ["uniform-100", "popular-100"])
def test_draws_are_fixed_by_seed_and_user_alone(kind):
    data = random_data(60, 220)
    model = Coarse(data.num_items)
    report = evaluate(model, data, candidates=kind, batch_size=60)
    assert (evaluate(model, data, candidates=kind, batch_size=7).ranks == report.ranks).all()
    some = evaluate(model, data, candidates=kind, users=[40, 3, 41])
    assert some.users.tolist() == [40, 3, 41]
    assert some.ranks.tolist() == report.ranks[[40, 3, 41]].tolist()
    assert (evaluate(model, data, candidates=kind, seed=1).ranks != report.ranks).any()


def test_top_popular_takes_the_most_popular_unseen_ones_in_order():
    popularity = np.array([5, 9, 9, 0] + [1] * 120)
    forbidden = (np.array([0, 1, 1]), np.array([2, 1, 3]))
    drawn = sample_negatives("top-popular-100", np.array([7, 8]), forbidden, popularity, seed=0)
    assert sorted(drawn[0]) == [1, 3, *range(5, 103)]
    assert sorted(drawn[1]) == [2, *range(5, 104)]


@pytest.mark.parametrize(
    ("kind", "weights"), [("uniform-100", [1, 1, 1, 1]), ("popular-100", [1, 2, 5, 0])]
)
def test_draws_follow_the_stated_distribution(kind, weights, monkeypatch):
    monkeypatch.setattr(candidates_module, "NUM_NEGATIVES", 1)
    users = np.arange(8000)
    forbidden = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    drawn = sample_negatives(kind, users, forbidden, np.array([1, 2, 5, 0]), seed=0)
    share = np.bincount(drawn[:, 0], minlength=5)[1:] / len(users)
    expected = np.array(weights) / sum(weights)
    error = np.sqrt(expected * (1 - expected) / len(users))
    assert (abs(share - expected) <= 4 * error).all(), share


def test_users_keep_their_own_index():
    data = random_data(40, 37)
    model = Coarse(data.num_items)
    everyone = evaluate(model, data, batch_size=9)
    some = evaluate(model, data, users=np.array([39, 0, 17]), batch_size=2)
    assert some.num_users == 3
    assert some.ranks.tolist() == everyone.ranks[[39, 0, 17]].tolist()


def test_modes_are_restored_also_after_a_failure():
    data = random_data(10, 37)
    model = Coarse(data.num_items)
    model.train()
    model.dropout.eval()
    evaluate(model, data)
    assert model.training and not model.dropout.training
    model.columns = 3
    with pytest.raises(InputError):
        evaluate(model, data)
    assert model.training and not model.dropout.training


def test_report_reads_as_a_mapping_a_table_and_json():
    data = random_data(30, 37)
    report = evaluate(Coarse(data.num_items), data, k=10)
    assert list(report) == ["hr@10", "ndcg@10", "mrr@10"] and len(report) == 3
    assert (report.split, report.candidates, report.seen) == ("test", "full", "exclude")
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["metrics"] == dict(report) and written["num_users"] == 30
    lines = report.table().splitlines()
    assert lines[0] == "test split, full ranking, seen items excluded, 30 users"
    assert lines[1].split() == ["@10"]
    assert lines[3].split() == ["NDCG", f"{report['ndcg@10']:.4f}"]
    sampled = evaluate(
        lambda batch: torch.rand(len(batch["user"]), 201),
        random_data(5, 200),
        candidates="uniform-100",
        seed=4,
    )
    assert sampled.table().startswith("test split, uniform-100 unseen candidates, seed 4, 5 users")


def broken(batch):
    scores = torch.zeros(len(batch["history"]), 38)
    scores[batch["user"] == 6, 5] = math.nan
    return scores


class Foreign(Coarse):
    item_ids = tuple(f"other{v}" for v in range(37))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split must be 'train' or 'validation' or 'test', got 'dev'"),
        ({"candidates": "random"}, "candidates must be 'full' or 'uniform-100'"),
        ({"seen": True}, "seen must be 'exclude' or 'keep' or 'last-N', got True"),
        ({"seen": "last-0"}, "seen must be 'exclude' or 'keep' or 'last-N', got 'last-0'"),
        ({"k": (5, 0)}, "k: expected positive integers"),
        ({"k": ()}, "k: expected positive integers"),
        ({"k": None}, "k: expected positive integers"),
        ({"k": "10"}, "k: expected positive integers"),
        ({"users": {3, 4}}, "users must be a list of integers"),
        ({"users": [True] * 10}, "users must be a list of integers"),
        ({"users": [3, 3]}, "users: an index occurs twice"),
        ({"users": [10]}, "user 10 is not in 0..9"),
        ({"candidates": "uniform-100"}, "needs 100 unseen items for every user, user number"),
        ({"model": broken}, "a score of user number 6 is NaN"),
        ({"model": Foreign(37)}, "trained on another catalogue than made"),
        ({"model": "a.safetensors"}, "model: expected something to call, got str"),
        ({"model": lambda batch: torch.zeros(2, 38)}, "do not cover 10 sequences"),
        ({"model": Coarse(36)}, r"shape \(10, 36\) with column 0 for item 1 do not cover"),
    ],
)
def test_bad_input_is_named(arguments, message):
    model = arguments.pop("model", Coarse(37))
    with pytest.raises(InputError, match=message):
        evaluate(model, random_data(10, 37), **arguments)


@pytest.mark.skipif("FISHERKERN_DATA" not in os.environ, reason="FISHERKERN_DATA is not set")
def test_popularity_on_ml_1m():
    data = load("ml-1m")
    popularity = torch.from_numpy(data.popularity()).float()

    def model(batch):
        return nn.functional.pad(popularity, (1, 0)).expand(len(batch["history"]), -1)

    full = evaluate(model, data)
    assert full.num_users == 6040
    for user in (0, 1234, 6039):
        history, target = parts(data, user, "test")
        others = set(range(1, data.num_items + 1)) - {*history, target}
        own = popularity[target - 1]
        rank = 1 + sum(bool(popularity[v - 1] >= own) for v in others)
        assert full.ranks[user] == rank
    for kind in SAMPLED:
        sampled = evaluate(model, data, candidates=kind)
        assert all((sampled.per_user[metric] >= full.per_user[metric]).all() for metric in full)
