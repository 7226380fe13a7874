"""Alignment by the loss of the average: lower than by weights, and every function kept."""

import itertools
import json

import pytest
import torch
from helpers.alignment import CASES, logits, random_transforms
from models import HISTORIES, NUM_ITEMS

import fisherkern as fk
from fisherkern.alignment import loss as learned_alignment
from fisherkern.alignment.align import align
from fisherkern.alignment.loss import RotationParams, _composed
from fisherkern.errors import InputError
from fisherkern.members.symmetries import symmetries_of, transform_model


def windows(batches=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, NUM_ITEMS + 1, (8, 6), generator=generator) for _ in range(batches)]


def members(case, count=3):
    return [CASES[case](seed) for seed in range(count)]


def loss_of(model, batches, seed=0):
    """The objective's mean without dropout, on a model of our own making."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return sum(float(OBJECTIVE(model.eval(), b, generator)) for b in batches) / len(batches)


OBJECTIVE = fk.NextItem(last_only=True)
HOW = {"by": "loss", "objective": OBJECTIVE, "steps": 12, "lr": 0.05}


def turns_at_all(case):
    groups = symmetries_of(CASES[case](0)).groups.values()
    return any(group.kind in learned_alignment.CONTINUOUS for group in groups)


@pytest.mark.parametrize("case", list(filter(turns_at_all, CASES)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_functions_are_kept_and_the_average_is_better(case, dtype):
    models = [model.to(dtype) for model in members(case)]
    models[1].train()
    before = {name: value.clone() for name, value in models[1].state_dict().items()}
    state = torch.get_rng_state()
    batches = windows(3)
    matched = align(models, reference=1)
    found = align(models, reference=1, loader=batches, **HOW)
    assert torch.equal(torch.get_rng_state(), state)
    assert models[1].training and not any(
        (value != before[name]).any() for name, value in models[1].state_dict().items()
    )
    for new, old in zip(found, models, strict=True):
        expected = logits(old.eval())
        bound = 1e-12 if dtype == torch.float64 else 1e-5 * float(expected.abs().max())
        assert (logits(new.eval()) - expected).abs().max() <= bound
    first, last = (loss_of(fk.merge(models), batches) for models in (matched, found))
    assert last < first - 1e-3 or "one" in case
    for new in found:
        report = new.align_report
        assert json.loads(json.dumps(report)) == report and report["by"] == "loss"
        assert report["loss"] == pytest.approx([first, last], rel=1e-5) and report["steps"] == 12
    still = dict(matched[1].named_parameters())
    assert all(torch.equal(p, still[name]) for name, p in found[1].named_parameters())


@pytest.mark.parametrize("case", ["SASRec-pre-untied-bias", "BERT4Rec-pre-untied", "GRU4Rec-tied"])
def test_turns_are_elements_of_their_groups(case):
    """Orthogonal; a rotation fixes 1, heads keep to their blocks; S = 0 is the identity."""
    symmetries = symmetries_of(CASES[case](0))
    turns = RotationParams(symmetries, torch.zeros(1, dtype=torch.float64))
    for exact, scale in itertools.product((False, True), (0.0, 0.7)):
        for number, free in enumerate(turns.free.values()):
            generator = torch.Generator().manual_seed(number)
            free.data = scale * torch.randn(free.shape, generator=generator, dtype=torch.float64)
        found = turns.transforms(exact=exact)
        assert all(turn.requires_grad != exact for turn in found.values())
        for name, group in symmetries.groups.items():
            for label in symmetries.labels(name):
                if group.kind not in learned_alignment.CONTINUOUS:
                    assert label not in found
                    continue
                turn, eye = found[label].detach(), torch.eye(group.size).double()
                assert (turn @ turn.t() - eye).abs().max() < 1e-12
                assert scale == 0.0 or (turn - eye).abs().max() > 0.05
                if scale == 0.0:
                    assert torch.equal(turn, eye) or (turn - eye).abs().max() < 1e-15
                if group.kind == "rotation":
                    assert (turn.sum(1) - 1).abs().max() < 1e-12
                if group.kind == "heads":
                    width = group.size // group.heads
                    inside = torch.kron(torch.eye(group.heads), torch.ones(width, width)).bool()
                    assert not turn[~inside].any()


@pytest.mark.parametrize("case", ["SASRec-pre-untied-bias", "GRU4Rec-untied"])
def test_composing_is_acting_twice(case):
    model = CASES[case](0)
    symmetries = symmetries_of(model)
    first, second = (random_transforms(symmetries, seed) for seed in (1, 2))
    second = {label: turn for label, turn in second.items() if turn.dim() == 2}
    once = transform_model(model, symmetries, _composed(first, second))
    twice = transform_model(transform_model(model, symmetries, first), symmetries, second)
    for name, parameter in once.named_parameters():
        assert (parameter - twice.get_parameter(name)).abs().max() < 1e-12, name
    index = {"residual": torch.randperm(6), "items": torch.randperm(6)}
    turn = {label: value for label, value in second.items() if label in index}
    once = transform_model(model, symmetries, _composed({k: index[k] for k in turn}, turn))
    both = transform_model(model, symmetries, {k: index[k] for k in turn})
    both = transform_model(both, symmetries, turn)
    for name, parameter in once.named_parameters():
        assert (parameter - both.get_parameter(name)).abs().max() < 1e-12, name


@pytest.mark.parametrize("case", ["SASRec-pre-untied-bias", "BERT4Rec-pre-untied", "Caser-untied"])
def test_gradients_of_the_averages_loss_are_those_of_differences(case):
    """The loss of a merge of members that are turned by a little, one way and the other."""
    near, (batch,) = align(members(case)), windows(1)
    symmetries = symmetries_of(near[0])
    average = learned_alignment._Average(symmetries, near, OBJECTIVE, 0)
    average.loss.eval()
    frees = [turns.free for turns in average.turns]
    names = [(number, label) for number, own in enumerate(frees) for label in own]
    slopes = torch.autograd.grad(average(batch), [frees[n][label] for n, label in names])
    for (number, label), slope in zip(names, slopes, strict=True):
        free = frees[number][label]
        for place in ((0, 0, 1), (-1, -1, 0)):
            sides = []
            for step in (1e-5, -1e-5):
                free.data[place] = step
                turned = average.turns[number].transforms(exact=True)
                other = transform_model(near[number + 1], symmetries, turned)
                every = [*near[: number + 1], other, *near[number + 2 :]]
                sides.append(loss_of(fk.merge(every), [batch]))
            free.data[place] = 0.0
            expected = (sides[0] - sides[1]) / 2e-5
            assert float(slope[place]) == pytest.approx(expected, abs=1e-8), (number, label)
    assert max(float(slope.abs().max()) for slope in slopes) > 1e-3


def test_what_does_not_help_is_not_done(monkeypatch):
    models = members("SASRec-pre-untied-bias", 2)
    matched = align(models)
    found = align(models, loader=windows(), **{**HOW, "steps": 3, "lr": 50.0})
    before, after = found[0].align_report["loss"]
    assert before == after
    for one, other in zip(matched, found, strict=True):
        for name, parameter in one.named_parameters():
            assert torch.allclose(parameter, other.get_parameter(name), rtol=0, atol=1e-14), name
    still = align(models, loader=windows(), **{**HOW, "steps": 0})
    assert still[0].align_report["loss"] == [before, before]
    (alone,) = align(models[:1], loader=windows(), **HOW)
    assert alone.align_report["loss"][0] == alone.align_report["loss"][1]


def test_the_same_call_gives_the_same_bits():
    models = members("SASRec-pre-untied-bias", 2)
    how = {**HOW, "objective": fk.NextItem(), "loader": windows(), "steps": 5}
    one, two = (align(models, **how)[1] for _ in range(2))
    assert all(torch.equal(p, two.get_parameter(name)) for name, p in one.named_parameters())


def test_rotate_false_turns_heads_alone():
    models = members("SASRec-pre-untied-bias", 2)
    found = align(models, rotate=False, loader=windows(), **HOW)[1]
    assert found.align_report["groups"]["residual"] == "permutation"
    assert torch.allclose(logits(found), logits(models[1]), rtol=0, atol=1e-12)
    assert found.align_report["loss"][1] < found.align_report["loss"][0]


class Trained(fk.NextItem):
    def modules(self):
        return {"head": torch.nn.Linear(1, 1)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": None}, "by='loss' needs objective"),
        ({"objective": "next"}, "objective is a str, not a loss like"),
        ({"objective": Trained()}, "objective has trainable parts"),
        ({"loader": None}, "by='loss' needs loader: batches of training windows"),
        ({"loader": []}, "loader gives no batch"),
        ({"steps": -1}, "steps is -1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"by": "weights", "loader": None}, "objective= is used by by='loss' only"),
        ({"loader": [HISTORIES + 5]}, "item id"),
        ({"loader": [{"history": HISTORIES}]}, "takes training windows, int64 tensors"),
        ({"loader": [HISTORIES[0]]}, "takes training windows, int64 tensors"),
    ],
)
def test_bad_arguments_are_named(given, message):
    with pytest.raises(InputError, match=message):
        align(members("SASRec-constant", 2), **{**HOW, "loader": windows(), **given})


def test_members_that_do_not_fit_are_named():
    models = members("GRU4Rec-tied", 2)
    for number, model in enumerate(models):
        model.item_ids = [f"{number}{v}" if v == 3 else str(v) for v in range(NUM_ITEMS)]
    with pytest.raises(InputError, match="averages the members, which need one catalogue"):
        align(models, loader=windows(), **HOW)
    with pytest.raises(InputError, match="these members admit permutations alone"):
        align(members("GRU4Rec-tied", 2), rotate=False, loader=windows(), **HOW)
