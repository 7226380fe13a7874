"""Pre-flight: cosines, barriers and inconsistency by hand, verdicts by hand-made members."""

import json
import math

import pytest
import torch
from helpers.merging import Toy, encoder, random_fisher
from torch import tensor

from benchmarks import preflight_record
from fisherkern.errors import InputError
from fisherkern.files import read_json
from fisherkern.merging import METHODS
from fisherkern.merging.auto import merge_auto
from fisherkern.merging.merge import merge
from fisherkern.merging.preflight import preflight


def value(model):
    return float(model.weight.detach())


def points(*values):
    return [Toy(weight=tensor(own)) for own in values]


def test_cosines_by_hand():
    models = points([3.0, 4.0], [4.0, 3.0], [-3.0, -4.0])
    found = preflight(models)
    expected = [[1, 0.96, -1], [0.96, 1, -0.96], [-1, -0.96, 1]]
    assert torch.allclose(
        tensor(found.cosine, dtype=torch.float64), tensor(expected, dtype=torch.float64)
    )
    assert found.task_cosine is None and found.scores is None and found.paths is None
    assert found.inconsistency is None


def test_task_vectors_are_from_the_base():
    found = preflight(points([3.0, 4.0], [2.0, 5.0]), base=points([2.0, 4.0])[0])
    assert found.task_cosine == [[1, 0], [0, 1]]
    same = preflight(points([3.0, 4.0], [2.0, 5.0]), base=points([3.0, 4.0])[0])
    assert same.task_cosine == [[0, 0], [0, 1]]  # of no change at all there is no direction


def test_cosines_count_the_rows_both_own():
    one, other = encoder("abc", 0), encoder("cd", 1)
    rows = {"item_embedding.weight": ([0, 3, 4], [0, 1, 3]), "output_bias": ([2], [0])}
    pairs = []
    for name, parameter in one.named_parameters():
        mine, others = parameter.detach().double(), other.get_parameter(name).detach().double()
        if name in rows:
            mine, others = mine[rows[name][0]], others[rows[name][1]]
        pairs.append((mine.flatten(), others.flatten()))
    mine, others = (torch.cat(part) for part in zip(*pairs, strict=True))
    expected = float(mine @ others / mine.norm() / others.norm())
    found = preflight([one, other])
    assert found.cosine[0][1] == pytest.approx(expected, rel=1e-12)
    assert found.cosine[0][0] == pytest.approx(1, rel=1e-12)
    assert found.items == {"1": 3, "2": 1}


def test_barrier_and_gain_by_hand():
    # s(t) at t = 0, 1/4, 1/2, 3/4, 1 along 0..4; the line between the ends is 10, 11, .., 14.
    table = {0.0: 10.0, 1.0: 8.0, 2.0: 11.0, 3.0: 16.0, 4.0: 14.0}
    found = preflight(points(0.0, 4.0), score=lambda model: table[value(model)])
    (path,) = found.paths
    assert path["members"] == [0, 1]
    assert path["t"] == [0, 0.25, 0.5, 0.75, 1]
    assert path["scores"] == [10, 8, 11, 16, 14]
    assert path["barrier"] == 3  # 11 - 8
    assert path["gain"] == 2  # 16 - 14
    assert found.scores == [10, 14]
    assert found.verdict.startswith("Merging is likely to help: between members 0 and 1")


def test_a_path_below_both_ends_has_a_negative_gain():
    table = {0.0: 10.0, 2.0: 7.0, 4.0: 14.0}
    found = preflight(points(0.0, 4.0), score=lambda model: table[value(model)], points=1)
    assert found.paths[0]["gain"] == -7
    assert found.paths[0]["barrier"] == 5


def test_no_member_is_scored_twice_where_the_items_are_the_same():
    calls = []

    def score(model):
        calls.append(value(model))
        return 1.0

    preflight(points(0.0, 4.0, 8.0), score=score, points=1)
    assert sorted(calls) == [0, 2, 4, 4, 6, 8]


def test_inconsistency_by_hand():
    right = {0.0: [1, 1, 0, 0], 1.0: [1, 0, 1, 0], 2.0: [1, 1, 0, 1]}
    found = preflight(points(0.0, 1.0, 2.0), hits=lambda model: right[value(model)])
    assert found.inconsistency == [[0, 0.5, 0.25], [0.5, 0, 0.75], [0.25, 0.75, 0]]


@pytest.mark.parametrize(
    ("values", "score", "words", "align"),
    [
        (([1.0, 0.0], [1.0, 0.1]), None, "likely to help: the cosine", False),
        (([1.0, 0.0], [1.0, 1.0]), None, "may help or harm", True),
        (([1.0, 0.0], [0.0, 1.0]), None, "likely to harm: the cosine", True),
        (([1.0, 0.0], [0.0, 1.0]), lambda m: 1.0, "unlikely to help or harm", False),
        # Along the chord of a circle the norm falls.
        (
            ([1.0, 0.0], [0.0, 1.0]),
            lambda m: float(m.weight.detach().norm()),
            "likely to harm",
            True,
        ),
        (
            ([1.0, 0.0], [0.0, 1.0]),
            lambda m: -float(m.weight.detach().norm()),
            "likely to help",
            False,
        ),
        (([1.0, 0.0],), lambda m: 1.0, "one member", False),
    ],
)
def test_verdicts(values, score, words, align):
    found = preflight(points(*values), score=score)
    assert words in found.verdict
    assert found.verdict.endswith(".") and ". " not in found.verdict
    assert ("score on validation was right about" in found.record) == (score is not None)
    assert found.recipe["align"] == align
    assert found.recipe["merge"]["method"] == (
        "auto" if score is not None and len(values) > 1 else "uniform"
    )
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": 0}, "points is 0"),
        ({"score": lambda m: math.nan}, "the score of member 0 is nan"),
        (
            {"score": lambda m: 1.0 if value(m) in (0, 4) else math.inf},
            "the score of the point 0.25 between 0 and 1 is inf",
        ),
        ({"hits": lambda m: [0.5]}, "hits of member 0 are no"),
        ({"hits": lambda m: []}, "hits of member 0 are no"),
        ({"hits": lambda m: [[1]]}, "hits of member 0 are no"),
        (
            {"hits": lambda m: [1] * (1 + int(value(m)))},
            "hits of member 1 are of 5 users and those of member 0 of 1",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        preflight(points(0.0, 4.0), **arguments)


def near(goal):
    """A score that is highest at `goal`."""

    def score(model):
        table = model.item_embedding.weight.detach()[1:-1]
        return -float((table - goal).square().sum())

    return score


@pytest.mark.parametrize("seed", range(3))
def test_auto_is_never_below_a_member_or_a_rule_it_could_try(seed):
    models = [encoder("abcd", seed + 10 * m) for m in range(3)]
    fishers = [random_fisher(model, seed + 50 + m) for m, model in enumerate(models)]
    score = near(torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)))
    found = merge(models, method="auto", score=score, fishers=fishers, base=models[2], steps=2)
    best = score(found)
    assert best >= max(map(score, models))
    for name, arguments in {
        "uniform": {},
        "fisher": {"fishers": fishers},
        "task_arithmetic": {"base": models[2]},
        "slerp": {},
        "greedy_soup": {"score": score},
    }.items():
        assert best >= score(merge(models, method=name, **arguments)) - 1e-12
    report = found.merge_report["auto"]
    assert report["score"] == best == max(c["score"] for c in report["candidates"])
    tried = [candidate["method"] for candidate in report["candidates"]]
    needed = {"grams", "products", "validation"}
    assert tried == ["single"] * 3 + [
        name
        for name, rule in METHODS.items()
        if not needed & {kind for kind, use in rule.inputs.items() if use == "must"}
    ]
    assert json.loads(json.dumps(found.merge_report)) == found.merge_report


def test_auto_gives_the_best_member_where_nothing_is_better():
    models = [encoder("abcd", m) for m in range(3)]
    goal = models[1].item_embedding.weight.detach()[1:-1].clone()
    found = merge(models, method="auto", score=near(goal), steps=0)
    assert all(map(torch.equal, found.parameters(), models[1].parameters()))
    assert found.merge_report["method"] == "single"
    assert found.merge_report["weights"] == [0, 1, 0]


def test_auto_unites_catalogues():
    models = [encoder("ab", 0), encoder("bc", 1)]
    found = merge(models, method="auto", score=lambda model: 0.0, steps=0)
    assert found.item_ids == ["a", "b", "c"]
    own = found.item_embedding.weight
    assert torch.equal(own[1:3], models[0].item_embedding.weight[1:3])
    assert torch.equal(own[3], models[1].item_embedding.weight[2])


def test_auto_learns_on_an_iterator_as_on_a_list():
    seen = []

    def counting(models, **arguments):
        if "validation" in arguments:
            seen.append(len(list(arguments["validation"])))
        plain = {k: v for k, v in arguments.items() if k not in ("validation", "score")}
        plain = {"method": "uniform"} if "search" in plain.values() else plain
        return merge(models, **{**plain, "method": "weighted", "weights": [1.0, 1.0]})

    inputs = dict.fromkeys(("weights", "fishers", "base", "grams", "products"))
    inputs |= {"score": lambda model: 0.0, "validation": iter([1, 2, 3])}
    merge_auto(counting, points(0.0, 1.0), inputs, {})
    assert seen == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "method 'auto' needs score"),
        ({"score": lambda m: 0.0, "weights": [1, 1]}, "method 'auto' takes no weights"),
        ({"score": lambda m: 0.0, "options": {"scale": 1}}, "method 'auto' takes no options"),
        ({"score": lambda m: math.nan}, "the score of candidate 'single' is nan"),
        ({"score": lambda m: None}, "the score of candidate 'single' is None, not a finite"),
        ({"score": lambda m: 0.0, "fishers": [{}]}, "there are 1 fishers for 2 members"),
    ],
)
def test_auto_names_what_does_not_fit(arguments, message):
    models = [encoder("ab", 0), encoder("ab", 1)]
    with pytest.raises(InputError, match=message):
        merge(models, method="auto", **arguments)


def test_the_record_is_that_of_the_stored_merges():
    lines = preflight_record.read(preflight_record.STORED)
    counts = preflight_record.counts(preflight_record.judge(lines))
    assert read_json(preflight_record.RECORD) == counts
    assert all(line["low"] <= line["test"] <= line["high"] for line in lines)
    # By a loop.
    assert counts["merges"] == len(lines)
    assert counts["scores"] == sum((x["validation"] > 0) == (x["test"] > 0) for x in lines)
    assert counts["cosines"] == sum((x["cosine"] >= 0.9) == (x["test"] > 0) for x in lines)


def test_what_is_no_function_is_named_before_any_work():
    models = [encoder("ab", 0), encoder("ab", 1)]
    for name in ("score", "hits"):
        with pytest.raises(InputError, match=f"{name}: a list is no function"):
            preflight(models, **{name: [1.0, 2.0]})
