"""Weights searched on a score."""

import pytest
import torch
from helpers.merging import Toy, encoder, random_fisher

from fisherkern.merging import merge

T = torch.tensor


def test_two_members_are_searched_on_a_grid_with_both_ends():
    models = [Toy(w=T([0.0])), Toy(w=T([1.0]))]
    merged = merge(models, weights="search", score=lambda m: -abs(m.w.item() - 0.3))
    report = merged.merge_report
    assert report["weights"] == pytest.approx([0.7, 0.3])
    assert merged.w.item() == pytest.approx(0.3)
    assert report["method"] == "weighted"
    tried = sorted(candidate["weights"][1] for candidate in report["candidates"])
    assert tried == pytest.approx([step / 20 for step in range(21)])
    for candidate in report["candidates"]:
        assert candidate["score"] == pytest.approx(-abs(candidate["weights"][1] - 0.3), abs=1e-6)


@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_the_best_member_alone_is_returned_when_nothing_beats_it(members):
    models = [encoder("abc", seed) for seed in range(members)]
    fishers = [random_fisher(model, seed) for seed, model in enumerate(models)]
    best = models[-1].dense.weight.detach()

    def score(model):
        return -float((model.dense.weight.detach() - best).square().sum())

    merged = merge(models, fishers=fishers, weights="search", score=score, steps=5)
    assert merged.merge_report["weights"] == [0.0] * (members - 1) + [1.0]
    assert torch.equal(merged.item_embedding.weight, models[-1].item_embedding.weight)


def test_more_members_are_searched_over_the_simplex_and_refined():
    target = [0.55, 0.35, 0.10]
    models = [Toy(w=row) for row in torch.eye(3, dtype=torch.float64)]

    def score(model):
        return -float((model.w.detach() - torch.tensor(target)).square().sum())

    def run(**arguments):
        return merge(models, weights="search", score=score, **arguments).merge_report

    report = run(steps=8, seed=3)
    tried = [tuple(candidate["weights"]) for candidate in report["candidates"]]
    for point in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]:
        assert point in tried
    assert tried[0] == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert len(tried) == 1 + 3 + 3 + 8 + 9
    assert all(sum(point) == pytest.approx(1) and min(point) >= 0 for point in tried)
    scores = [candidate["score"] for candidate in report["candidates"]]
    assert report["weights"] == report["candidates"][scores.index(max(scores))]["weights"]
    # The draws of this seed are refined, not only picked from.
    assert max(scores[-9:]) > max(scores[:-9])
    assert run(steps=8, seed=3) == report
    assert run(steps=8, seed=4) != report


def test_equal_scores_give_the_even_mix():
    for members in (2, 3):
        models = [Toy(w=T([float(m)])) for m in range(members)]
        merged = merge(models, weights="search", score=lambda model: 1.0)
        assert merged.merge_report["weights"] == pytest.approx([1 / members] * members)


def test_the_result_is_the_winner_and_not_the_last_tried():
    models = [Toy(w=T([0.0])), Toy(w=T([1.0]))]
    merged = merge(models, weights="search", score=lambda m: -abs(m.w.item() - 0.5))
    assert merged.w.item() == 0.5


def test_the_report_is_json():
    import json

    models = [encoder("abc", 1), encoder("bcd", 2)]
    fishers = [random_fisher(model, seed) for seed, model in enumerate(models)]
    merged = merge(models, fishers=fishers, weights="search", score=lambda m: 0.0)
    assert json.loads(json.dumps(merged.merge_report, allow_nan=False)) == merged.merge_report
    assert set(merged.merge_report["coverage"]) == {n for n, _ in merged.named_parameters()}
