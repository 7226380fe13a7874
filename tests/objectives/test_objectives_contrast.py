"""Contrastive losses against their equations, written out as loops in float64."""

import math

import pytest
import torch
from objective_models import generator

import fisherkern as fk


def views(count, seed=0, width=3):
    return torch.randn(2, count, width, generator=generator(seed), dtype=torch.float64)


def similarity(a, b, kind):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    if kind == "dot":
        return dot
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def slow_ntxent(first, second, temperature, kind, same):
    """-log exp(s_i,i+) / Σ over the positive and all allowed others, mean over 2N."""
    rows = first.tolist() + second.tolist()
    count = len(first)
    losses = []
    for i in range(2 * count):
        partner = i + count if i < count else i - count
        total = 0.0
        for j in range(2 * count):
            tied = same is not None and bool(same[i % count, j % count])
            if j == partner or (j != i and not tied):
                total += math.exp(similarity(rows[i], rows[j], kind) / temperature)
        positive = math.exp(similarity(rows[i], rows[partner], kind) / temperature)
        losses.append(-math.log(positive / total))
    return sum(losses) / len(losses)


def slow_sgcl(first, second, q, weight, temperature, kind, same):
    """The released `scl_loss`: the positive is in the sum over j and added once more."""
    first, second = first.tolist(), second.tolist()
    terms = []
    for i in range(len(first)):
        positive = math.exp(similarity(first[i], second[i], kind) / temperature)
        total = 0.0
        for j in range(len(second)):
            if j == i or same is None or not same[i, j]:
                total += math.exp(similarity(first[i], second[j], kind) / temperature)
        terms.append(-(positive**q) / q + (weight * (positive + total)) ** q / q)
    return sum(terms) / len(terms)


SAME = torch.tensor([5, 3, 5, 5, 2])[:, None] == torch.tensor([5, 3, 5, 5, 2])


@pytest.mark.parametrize("kind", ["dot", "cosine"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("same", [None, SAME])
def test_losses_equal_their_equations(kind, temperature, same):
    first, second = views(5)
    loss = fk.NTXent(temperature, kind)(first, second, same)
    assert loss.item() == pytest.approx(slow_ntxent(first, second, temperature, kind, same))
    for q, weight in ((0.01, 0.1), (0.5, 0.3), (1.0, 0.02)):
        loss = fk.SymmetricNoiseTolerant(q, weight, temperature, kind)(first, second, same)
        slow = slow_sgcl(first, second, q, weight, temperature, kind, same)
        assert loss.item() == pytest.approx(slow, rel=1e-10)


def test_small_q_is_infonce_up_to_a_constant():
    first, second = views(7)
    scores = torch.nn.functional.normalize(first, dim=1)
    scores = scores @ torch.nn.functional.normalize(second, dim=1).T / 0.2
    total = scores.logsumexp(dim=1).logaddexp(scores.diagonal())
    infonce = (total - scores.diagonal()).mean().item()
    loss = fk.SymmetricNoiseTolerant(q=1e-7, weight=0.1)(first, second).item()
    assert loss == pytest.approx(infonce + math.log(0.1), abs=1e-5)


@pytest.mark.parametrize(
    "loss", [fk.NTXent(0.5, "cosine"), fk.NTXent(), fk.SymmetricNoiseTolerant()]
)
@pytest.mark.parametrize("same", [None, SAME])
def test_gradients(loss, same):
    first, second = (view.clone().requires_grad_() for view in views(5))
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, same), (first, second))


def test_one_sequence_has_no_negatives():
    first, second = views(1)
    assert fk.NTXent()(first, second).item() == 0.0
    assert fk.NTXent()(first, second, torch.ones(1, 1, dtype=torch.bool)).item() == 0.0
    # All of one target: every other view is left out.
    first, second = views(4)
    assert fk.NTXent()(first, second, torch.ones(4, 4, dtype=torch.bool)).item() == 0.0


def test_low_temperatures_do_not_overflow():
    first, second = (100 * view.float() for view in views(6))
    for loss in (fk.NTXent(1e-3), fk.SymmetricNoiseTolerant(temperature=1e-3, q=0.01)):
        assert loss(first, second).isfinite()


def test_autocast_does_not_round_similarities():
    first, second = (view.float() for view in views(6, width=16))
    for loss in (fk.NTXent(0.05, "cosine"), fk.SymmetricNoiseTolerant(temperature=0.05)):
        with torch.autocast("cpu", torch.bfloat16):
            low = loss(first, second)
        assert low.item() == pytest.approx(loss(first, second).item(), rel=1e-5)


@pytest.mark.parametrize("kind", [fk.NTXent, fk.SymmetricNoiseTolerant])
def test_wrong_arguments_are_named(kind):
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(fk.InputError, match="temperature must be positive"):
            kind(temperature=temperature)
    with pytest.raises(fk.InputError, match="similarity must be 'dot' or 'cosine', got 'l2'"):
        kind(similarity="l2")


def test_wrong_arguments_of_the_symmetric_loss_are_named():
    for q in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(fk.InputError, match=r"q must be in \(0, 1\]"):
            fk.SymmetricNoiseTolerant(q=q)
    for weight in (0.0, -1.0, math.inf):
        with pytest.raises(fk.InputError, match="weight must be positive"):
            fk.SymmetricNoiseTolerant(weight=weight)
