"""Paired comparisons with their intervals, and the score ensemble."""

import dataclasses
import json
import math
import statistics

import numpy as np
import pytest
import torch
from torch import nn

from fisherkern.data import synthetic
from fisherkern.errors import InputError
from fisherkern.evaluation import Protocol, Report, ScoreEnsemble, compare, evaluate

FULL = Protocol("test", "full", "exclude", 0, "abc")


def report(values, protocol=FULL, users=None, metric="ndcg@10"):
    values = np.asarray(values, dtype=np.float64)
    users = np.arange(len(values)) if users is None else np.asarray(users)
    return Report({metric: values}, users, np.ones(len(values), dtype=np.int64), protocol)


def test_differences_table():
    difference = compare(report([1.0, 0.5, 0.0, 0.5]), report([0.5, 0.5, 0.0, 0.0]))["ndcg@10"]
    assert difference.mean == 0.25
    # sd of (.5, 0, 0, .5) with n - 1 = 3 is sqrt(1 / 12); over sqrt(4) = .14433757
    assert difference.standard_error == pytest.approx(0.14433757, abs=1e-8)
    assert difference.low == pytest.approx(0.25 - 1.96 * 0.14433757, abs=1e-8)
    assert difference.high == pytest.approx(0.25 + 1.96 * 0.14433757, abs=1e-8)


def test_difference_is_paired_and_antisymmetric():
    random = np.random.default_rng(0)
    b = random.random(200)
    a = b + 0.01 + 0.001 * random.standard_normal(200)
    forward, backward = compare(report(a), report(b)), compare(report(b), report(a))
    ours, theirs = forward["ndcg@10"], backward["ndcg@10"]
    assert ours.standard_error == pytest.approx(
        statistics.stdev((a - b).tolist()) / math.sqrt(200), rel=1e-12
    )
    # Unpaired it would be sqrt(2 / 12 / 200) = .029 and say nothing.
    assert ours.low > 0
    assert (theirs.mean, theirs.low) == (-ours.mean, -ours.high)


def test_interval_covers_the_truth_95_times_in_100():
    random = np.random.default_rng(1)
    trials = 2000
    inside = 0
    for _ in range(trials):
        d = compare(report(random.normal(0.3, 1, 60)), report(random.normal(0.0, 1, 60)))
        inside += d["ndcg@10"].low <= 0.3 <= d["ndcg@10"].high
    assert 0.93 <= inside / trials <= 0.965


def test_comparison_reads_as_a_mapping_a_table_and_json():
    comparison = compare(report([1.0, 0.0]), report([0.0, 0.0]))
    assert list(comparison) == ["ndcg@10"] and len(comparison) == 1
    written = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert written["differences"]["ndcg@10"]["mean"] == 0.5
    lines = comparison.table().splitlines()
    assert lines[0] == "test split, full ranking, seen items excluded, 2 users, paired"
    assert lines[2].split() == ["ndcg@10", "+0.5000", "0.5000", "-0.4800", "to", "+1.4800"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "validation"}, "differ in split: test and validation"),
        ({"candidates": "uniform-100"}, "differ in candidates: full and uniform-100"),
        ({"seen": "keep"}, "differ in seen: exclude and keep"),
        ({"data_fingerprint": "def"}, "differ in data_fingerprint"),
    ],
)
def test_other_protocols_do_not_compare(change, message):
    other = dataclasses.replace(FULL, **change)
    with pytest.raises(InputError, match=message):
        compare(report([1.0, 2.0]), report([1.0, 2.0], other))


def test_the_seed_counts_where_candidates_are_drawn():
    other = dataclasses.replace(FULL, seed=1)
    assert compare(report([1.0, 2.0]), report([1.0, 2.0], other))["ndcg@10"].mean == 0
    drawn = dataclasses.replace(FULL, candidates="popular-100")
    with pytest.raises(InputError, match="differ in seed: 0 and 1"):
        compare(report([1.0, 2.0], drawn), report([1.0, 2.0], dataclasses.replace(drawn, seed=1)))


def test_other_users_or_metrics_do_not_compare():
    with pytest.raises(InputError, match="of different users"):
        compare(report([1.0, 2.0], users=[0, 1]), report([1.0, 2.0], users=[0, 2]))
    with pytest.raises(InputError, match="no metric in common"):
        compare(report([1.0, 2.0]), report([1.0, 2.0], metric="hr@5"))
    with pytest.raises(InputError, match="a dict is no report of evaluate"):
        compare(report([1.0, 2.0]), dict(report([1.0, 2.0])))
    with pytest.raises(InputError, match="two users or more"):
        compare(report([1.0]), report([1.0]))


class Table(nn.Module):
    """Logits looked up by the last item; notes the width of the history it was given."""

    logits: torch.Tensor

    def __init__(self, logits, max_len=5, first_item=1):
        super().__init__()
        self.register_buffer("logits", torch.as_tensor(logits, dtype=torch.float64))
        self.max_len, self.first_item = max_len, first_item

    def forward(self, batch):
        history = batch["history"] if isinstance(batch, dict) else batch
        self.width = history.shape[1]
        return self.logits[history[:, -1]]


def random_table(num_items, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    return Table(torch.randn(num_items + 1, num_items, generator=generator), **options)


def test_ensemble_is_the_mean_log_softmax():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.6, 0.3])
    # Shifts of the logits, which softmax forgets, must not count.
    ensemble = ScoreEnsemble([Table([(p.log() + 100).tolist()]), Table([q.log().tolist()])])
    scores = ensemble({"history": torch.zeros(1, 5, dtype=torch.int64)})
    torch.testing.assert_close(scores[0], (p.double() * q.double()).sqrt().log(), atol=1e-5, rtol=0)


def test_ensemble_takes_tensors_and_gives_members_their_own_length():
    short, long = random_table(9, 0, max_len=3), random_table(9, 1, max_len=5)
    ensemble = ScoreEnsemble([short, long])
    assert (ensemble.max_len, ensemble.first_item) == (5, 1)
    history = torch.arange(10).reshape(2, 5)
    scores = ensemble(history)
    assert (short.width, long.width) == (3, 5)
    assert torch.equal(scores, ensemble({"history": history}))


def test_ensemble_keeps_minus_infinity():
    masked = [[-math.inf, 0.0, 1.0]]
    scores = ScoreEnsemble([Table(masked), Table(masked)])(torch.zeros(1, 5, dtype=torch.int64))
    assert scores[0, 0] == -math.inf and torch.isfinite(scores[0, 1:]).all()


def test_ensemble_is_evaluated_like_a_model():
    data = synthetic(num_users=50, num_items=40)
    members = [random_table(40, seed) for seed in range(3)]
    alone = evaluate(members[0], data)
    assert (evaluate(ScoreEnsemble(members[:1]), data).ranks == alone.ranks).all()
    assert (evaluate(ScoreEnsemble(members), data).ranks != alone.ranks).any()


def test_members_that_do_not_fit_are_named():
    with pytest.raises(InputError, match="no members"):
        ScoreEnsemble([])
    with pytest.raises(InputError, match="members 0 and 1 differ in first_item"):
        ScoreEnsemble([random_table(9, 0), random_table(9, 0, first_item=0)])
    named, other = random_table(9, 0), random_table(9, 0)
    named.item_ids, other.item_ids = ["a"], ["b"]
    with pytest.raises(InputError, match="members 0 and 1 differ in item_ids"):
        ScoreEnsemble([named, other])
    with pytest.raises(InputError, match=r"member 1 gives scores of shape \(1, 8\), member 0"):
        ScoreEnsemble([random_table(9, 0), random_table(8, 0)])(torch.zeros(1, 5).long())
