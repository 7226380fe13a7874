"""The variance of risks between environments, against loops over places."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from models import bert
from objective_models import NAMES, T, V, causal, check_gradient, generator, padded

import fisherkern as fk
from fisherkern.objectives import from_settings

# The training items of the users, whose last two actions are held out. Items 1, 2, ... 11 train
# 8, 4, 4, 2, 2, 1, 1, 1, 1, 0, 0 times.
HISTORIES = [[1, 2, 1, 2, 1, 2], [1, 3, 1, 2, 1], [3, 3, 4, 1, 5], [4, 5, 6, 7], [8, 9, 3, 1], []]
COUNTS = [8, 4, 4, 2, 2, 1, 1, 1, 1, 0, 0]
DATA = fk.SequenceDataset(
    "made",
    [item for row in HISTORIES for item in [*row, 10, 11]],
    [0, 8, 15, 22, 28, 34, 36],
    NAMES,
    list("abcdef"),
)
# A third of the 24 training actions each: what has fewer than 4, items 2 and 3, and item 1.
OF_ITEM = {v: 0 if n < 4 else 1 if n < 8 else 2 for v, n in enumerate(COUNTS, start=1)}
TOKENS = padded([[3, 5, 3, 8, 1, 2], [7], [], [2, 9, 4, 4], [1, 2, 1, 1], [10, 6]], T + 1)
OBJECTIVES = {
    "next": (fk.NextItem(), causal),
    "last": (fk.NextItem(last_only=True), bert),
    "masked": (fk.MaskedItems(0.5), bert),
}


def mean_log(items: list[int]) -> float:
    return sum(math.log(max(COUNTS[v - 1], 1)) for v in items) / len(items)


def of_sequence(items: list[int]) -> int:
    """The third of the users whose training items are as popular."""
    users = sorted(mean_log(row) for row in HISTORIES if row)
    return sum(mean_log(items) >= users[int(len(users) * share)] for share in (1 / 3, 2 / 3))


def by_loops(name: str, tokens: torch.Tensor, by: str, weight: float) -> tuple[float, int]:
    """The loss and the number of environments, place by place."""
    objective, make = OBJECTIVES[name]
    model = make()
    head, bias = model.head()
    losses: dict[int, list[float]] = {}
    if name == "masked":
        positions, chosen = objective.draw(tokens, generator())
    for n, row in enumerate(tokens.tolist()):
        if name == "masked":
            targets = positions[n][chosen[n]].tolist()
        else:
            targets = [t for t in range(1, len(row)) if row[t - 1] and row[t]]
            targets = targets[-1:] if name == "last" else targets
        for t in targets:
            if name == "masked":
                history = tokens[n : n + 1].clone()
                history[0, targets] = model.mask_token
                h = model.transform(model.states(history))[0, t]
            else:
                h = model.transform(model.states(tokens[n : n + 1, :-1]))[0, t - 1]
                h = model.encode(tokens[n : n + 1, :-1])[0] if name == "last" else h
            score = head @ h + bias
            loss = (score.logsumexp(0) - score[row[t] - 1]).item()
            items = [v for v in row if v]
            losses.setdefault(OF_ITEM[row[t]] if by == "target" else of_sequence(items), []).append(
                loss
            )
    every = [loss for own in losses.values() for loss in own]
    risks = [sum(own) / len(own) for own in losses.values()]
    mean = sum(risks) / len(risks)
    variance = sum((risk - mean) ** 2 for risk in risks) / len(risks)
    return sum(every) / len(every) + weight * variance, len(risks)


@pytest.mark.parametrize("by", ["target", "sequence"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_adds_the_variance_of_the_risks(name: str, by: str) -> None:
    inner, make = OBJECTIVES[name]
    model, tokens = make(), TOKENS if inner.lookahead else TOKENS[:, 1:]
    objective = fk.VREx(inner, 0.7, by).bind(DATA, T)
    expected, environments = by_loops(name, tokens, by, 0.7)
    assert environments > 1
    assert objective(model, tokens, generator()).item() == pytest.approx(expected, abs=1e-10)
    check_gradient(objective, model, tokens)
    plain, variance = objective.terms(model, tokens, generator())
    assert plain.loss.item() == pytest.approx(inner(model, tokens, generator()).item(), abs=1e-12)
    assert plain.targets == inner.targets(model, tokens) == objective.targets(model, tokens)
    assert (variance.targets, variance.weight) == (environments, 0.7)


def test_it_adds_up_and_stands_in_repeated_windows() -> None:
    model, own = causal(), fk.VREx(fk.NextItem(), 0.7).bind(DATA, T)
    parts = [own, fk.CL4SRec()]
    one = generator()
    values = [p(model, p.columns(TOKENS, 1 - p.lookahead), one).item() for p in parts]
    together = (own + 0.1 * fk.CL4SRec())(model, TOKENS, generator()).item()
    assert together == pytest.approx(values[0] + 0.1 * values[1], abs=1e-12)
    repeated = fk.RepPad(fk.VREx(fk.NextItem(), 0.7)).bind(DATA, T)
    tokens = repeated.repeat(TOKENS, generator())
    assert repeated(model, TOKENS, generator()) == own(model, tokens, generator())


def test_a_batch_of_one_environment_has_no_variance_and_an_empty_one_no_loss() -> None:
    model, objective = causal(), fk.VREx(fk.NextItem()).bind(DATA, T)
    alone = padded([[2, 1, 1, 1]], T + 1)
    terms = objective.terms(model, alone, generator())
    assert (terms[1].loss.item(), terms[1].targets) == (0.0, 1)
    check_gradient(objective, model, alone)
    assert [t.loss.item() for t in objective.terms(model, TOKENS[1:3], generator())] == [0, 0]


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    data = fk.synthetic(60, 30, seed=1)
    made = []

    def stop(epoch: int, model: fk.SASRec, loss: float) -> None:
        if epoch == len(made) + 2:
            raise KeyboardInterrupt

    def run(state: Path, on_epoch=None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = fk.SASRec(30, max_len=8, dim=8)
        objective = from_settings(fk.VREx(fk.NextItem(), 2.0, "sequence").settings())
        settings = {"epochs": 3, "batch_size": 16, "progress": False, "save_every_steps": 1}
        fk.train(model, data, objective=objective, state=state, on_epoch=on_epoch, **settings)
        return model.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop)
    for name, tensor in run(tmp_path / "cut").items():
        assert torch.equal(tensor, whole[name]), name


def test_what_cannot_work_is_refused() -> None:
    for inner in (fk.CL4SRec(), fk.NextItem() + fk.CL4SRec(), "NextItem"):
        with pytest.raises(fk.InputError, match="objective must be NextItem or MaskedItems, got"):
            fk.VREx(inner)
    with pytest.raises(fk.InputError, match="loss of NextItem must be 'softmax', got 'bce'"):
        fk.VREx(fk.NextItem("bce"))
    with pytest.raises(fk.InputError, match="environments must be at least 2, got 1"):
        fk.VREx(fk.NextItem(), environments=1)
    with pytest.raises(fk.InputError, match="by must be 'target' or 'sequence', got 'month'"):
        fk.VREx(fk.NextItem(), by="month")
    with pytest.raises(fk.InputError, match="weight must be 0 or more"):
        fk.VREx(fk.NextItem(), -1.0)
    with pytest.raises(fk.InputError, match="VREx must be bound"):
        fk.VREx(fk.NextItem())(causal(), TOKENS, generator())
    for by, most in (("target", 4), ("sequence", 5)):
        fk.VREx(fk.NextItem(), by=by, environments=most).bind(DATA, T)
        with pytest.raises(fk.InputError, match=rf"environments = 6, but .* only {most} apart"):
            fk.VREx(fk.NextItem(), by=by, environments=6).bind(DATA, T)
    alike = fk.SequenceDataset("alike", [1, 2, 3, 1, 2], [0, 5], NAMES, ["a"])
    for by in ("target", "sequence"):
        with pytest.raises(fk.InputError, match="only 1 apart"):
            fk.VREx(fk.NextItem(), by=by).bind(alike, T)
    nothing = fk.SequenceDataset("nothing", [1, 2], [0, 2], NAMES, ["a"])
    with pytest.raises(fk.InputError, match="only 0 apart"):
        fk.VREx(fk.NextItem()).bind(nothing, T)


def test_an_objective_that_is_bound_is_equal_to_itself_unbound() -> None:
    objective = fk.VREx(fk.MaskedItems(0.3), 0.5, "sequence", 2)
    bound = objective.bind(DATA, T)
    assert bound.settings() == objective.settings() and bound == objective
    assert dataclasses.replace(bound, weight=1.0) != objective and V == len(COUNTS)
