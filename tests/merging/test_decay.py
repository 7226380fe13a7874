"""Weights that stand for a decayed learning rate, against the loop of updates."""

import math

import pytest
import torch
from helpers.merging import Toy
from hypothesis import given
from hypothesis import strategies as st

import fisherkern as fk
from fisherkern.errors import InputError
from fisherkern.merging.decay import DECAYS

RATES = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 + 0.5 * math.cos(math.pi * t),
    "1-sqrt": lambda t: 1 - t**0.5,
}


@given(st.integers(1, 60), st.sampled_from(sorted(RATES)))
def test_weights_are_convex_and_their_tails_are_the_rates(count, schedule):
    weights = fk.decay_weights(count, schedule)
    assert len(weights) == count and min(weights) >= 0 and sum(weights) == pytest.approx(1)
    for i in range(count):
        assert sum(weights[i:]) == pytest.approx(RATES[schedule](i / count), abs=1e-12)


@pytest.mark.parametrize("schedule", sorted(RATES))
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_merge_is_the_loop_with_a_decayed_rate(schedule, count):
    # The gradients are those of the constant run, as in the paper's first-order argument.
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(count - 1, 3, 4, 2, generator=generator).double()
    theta = torch.randn(4, 2, generator=generator).double()
    run, decayed = [theta.clone()], theta.clone()
    for i, interval in enumerate(gradients, start=1):
        for gradient in interval:
            theta = theta - 0.1 * gradient
            decayed = decayed - 0.1 * RATES[schedule](i / count) * gradient
        run.append(theta.clone())
    members = [Toy(w=own) for own in run]
    weights = f"{schedule}-decay"
    merged = fk.merge(iter(members), weights=weights)
    torch.testing.assert_close(merged.w.detach(), decayed, rtol=1e-12, atol=1e-12)
    assert merged.merge_report["method"] == "weighted"
    again = fk.merge(members, weights=fk.decay_weights(count, schedule))
    assert torch.equal(again.w, merged.w) and weights in DECAYS


def test_the_order_of_the_checkpoints_is_that_of_the_run():
    run = [Toy(w=torch.tensor([float(step)]).double()) for step in range(4)]
    one = float(fk.merge(run, weights="1-sqrt-decay").w)
    other = float(fk.merge(run[::-1], weights="1-sqrt-decay").w)
    table = [0.5, math.sqrt(2) / 2 - 0.5, math.sqrt(3) / 2 - math.sqrt(2) / 2]
    table.append(1 - math.sqrt(3) / 2)
    assert one == pytest.approx(sum(w * step for step, w in enumerate(table)), rel=1e-14)
    assert one + other == pytest.approx(3)
    assert float(fk.merge(run, weights="linear-decay").w) == 1.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: fk.decay_weights(0), "count must be at least 1"),
        (lambda run: fk.decay_weights(2, "sqrt"), "schedule must be 'linear' or 'cosine' or"),
        (lambda run: fk.merge(run, weights="linear"), "'linear' where numbers, 'search' or one of"),
        (lambda run: fk.merge(run, method="uniform", weights="linear-decay"), "takes no weights"),
    ],
)
def test_what_is_unknown_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call([Toy(w=torch.zeros(1)), Toy(w=torch.ones(1))])
