"""The check of the first batch: what no rule foresees is refused, what is right passes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import brute
import pytest
import torch
import torch.nn.functional as F
from helpers.fisher import assert_equal
from models import HISTORIES, NUM_ITEMS, shaken
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.fisher.layers import HANDLERS
from fisherkern.fisher.layers.grads import EmbeddingGrad, LinearGrad

# Of one length, so that they stay together.
FULL = HISTORIES % NUM_ITEMS + 1


class Small(nn.Module):
    """An embedding, a layer and an output layer, tied or not."""

    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, 4)
        self.mix = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, NUM_ITEMS + 1)
        if tied:
            self.out.weight = self.items.weight
        self.to(dtype)

    def states(self, history: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.mix(self.items(history)))).sum(1)

    def forward(self, history: Tensor) -> Tensor:
        return self.out(self.states(history))


def fisher(model: Any, batches: Sequence[Tensor] = (HISTORIES,), **settings: Any) -> fk.DiagFisher:
    given = {"sampler": "exact", "progress": False} | settings
    return fk.diag_fisher(model, list(batches), **given)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_right_models_pass(tied: bool, dtype: torch.dtype, positions: str) -> None:
    class EveryPosition(Small):
        def forward(self, history: Tensor) -> Tensor:
            return self.out(self.norm(torch.tanh(self.mix(self.items(history)))))

    kind = Small if positions == "last" else EveryPosition
    found = fisher(shaken(kind(tied, dtype)), sampler="sketch", positions=positions)
    assert all(bool((value > 0).any()) for value in found.values())


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_wrong_rule_is_refused(
    tied: bool, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lookups whose gradients are 2 % too large."""
    right = EmbeddingGrad.positions
    monkeypatch.setattr(EmbeddingGrad, "positions", lambda use, delta: right(use, delta) * 1.02)
    model = shaken(Small(tied))
    with pytest.raises(fk.InputError, match=r"'items.weight' are 0\.\d+ of their largest off"):
        fisher(model)
    assert fisher(model, check=False)["items.weight"].isfinite().all()


def test_a_rule_that_sees_the_wrong_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear layer's, of the next position."""
    right = LinearGrad.__init__

    def shifted(use: LinearGrad, param: Any, inputs: Tensor) -> None:
        right(use, param, inputs.roll(1, dims=1))

    monkeypatch.setattr(LinearGrad, "__init__", shifted)
    with pytest.raises(fk.InputError, match="'mix.weight' are"):
        fisher(shaken(Small()))


def test_a_rule_that_leaves_a_parameter_out_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer norm without its bias."""
    right = HANDLERS[F.layer_norm]
    monkeypatch.setitem(HANDLERS, F.layer_norm, lambda call: right(call)[:1])
    model = shaken(Small())
    expected = brute.all_gradients(model, HISTORIES)
    assert_equal(fisher(model), brute.fisher(expected[1], expected[0]))


def test_a_closed_form_that_is_not_the_models_is_refused() -> None:
    """Of five sequences and more another function: four, on which it is found, show nothing."""

    class Switching(Small):
        def forward(self, history: Tensor) -> Tensor:
            h = self.states(history)
            return self.out(h if len(h) < 5 else h - 0.1 * h.mean(0))

    with pytest.raises(fk.InputError, match="depend on the other sequences"):
        fisher(shaken(Switching()), [FULL.repeat(4, 1)])


def test_a_batch_of_one_sequence_shows_no_dependence() -> None:
    """The first of several is checked as well."""

    class Centred(Small):
        def forward(self, history: Tensor) -> Tensor:
            h = self.states(history)
            return self.out(h - 0.5 * h.mean(0))

    with pytest.raises(fk.InputError, match="depend on the other sequences"):
        fisher(shaken(Centred()), [HISTORIES[:1], HISTORIES[1:2], HISTORIES])


class LaterMean(Small):
    """Sequences depend on one another in batches with a certain item."""

    def forward(self, history: Tensor) -> Tensor:
        states = self.states(history)
        if (history == NUM_ITEMS).any():
            states = states - states.mean(dim=0)
        return self.out(states)


def test_a_later_batch_that_shows_dependence_is_refused() -> None:
    calm = torch.where(FULL == NUM_ITEMS, 1, FULL)
    later = calm.clone()
    later[0, 0] = NUM_ITEMS
    fisher(LaterMean(), [calm, calm])
    for batches in ([calm, later], [calm] * 20 + [later] * 20):
        with pytest.raises(fk.InputError, match="depend on the other sequences"):
            fisher(LaterMean(), batches)
    fisher(LaterMean(), [calm, later], check=False)


def test_columns_that_are_padding_in_all_sequences_may_go() -> None:
    """An encoder leaves them out, so one sequence alone has fewer positions than in its batch."""
    torch.manual_seed(0)
    model = fk.SASRec(NUM_ITEMS, max_len=6, dim=8, heads=2, layers=1).double()
    history = torch.randint(1, NUM_ITEMS + 1, (3, 6))
    history[1:, :4] = 0
    found = fk.diag_fisher(model, [history], positions="all", sampler="exact", progress=False)
    alone = [
        fk.diag_fisher(model, [row[None]], positions="all", sampler="exact", progress=False)
        for row in history
    ]
    for name, value in found.items():
        counts = torch.tensor([own.meta["num_positions"] for own in alone])
        expected = sum(n * own[name] for n, own in zip(counts, alone, strict=True)) / counts.sum()
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-15)


def test_one_sequence_beside_a_kink_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Kink(Small):
        def forward(self, history: Tensor) -> Tensor:
            states = self.states(history)
            jumps = (torch.arange(len(history)) == 1) & (history[:, 0] == NUM_ITEMS)
            return self.out(states + jumps[:, None])

    calm = torch.where(FULL == NUM_ITEMS, 1, FULL)[:2]
    later = calm.clone()
    later[1, 0] = NUM_ITEMS
    fisher(Kink(), [calm, later])
    assert ["those in its batch" in own.getMessage() for own in caplog.records] == [True]
    with pytest.raises(fk.InputError, match="depend on the other sequences"):
        fisher(Kink(), [calm, later, later])


@pytest.mark.parametrize("data", [False, True])
def test_weights_that_a_pass_changes_are_refused(data: bool) -> None:
    """In place, seen by a version counter or not."""

    class Decaying(Small):
        def forward(self, history: Tensor) -> Tensor:
            weight = self.mix.weight.data if data else self.mix.weight
            with torch.no_grad():
                weight.mul_(1 - 1e-7)
            return super().forward(history)

    with pytest.raises(fk.InputError, match="changes (its weights|'mix.weight')"):
        fisher(shaken(Decaying()))


@pytest.mark.parametrize("in_place", [True, False])
def test_buffers_that_count_passes_are_left_as_they_were(in_place: bool) -> None:
    """Where the logits do not depend on them; after a refusal as well."""

    class Counting(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, history: Tensor) -> Tensor:
            if in_place:
                self.passes += 1
            else:
                self.passes = self.passes + 1
            return super().forward(history)

    model = shaken(Counting())
    before = model.passes
    fisher(model)
    with pytest.raises(fk.InputError):
        fisher(model, [])
    assert model.passes is before and int(before) == 0


def test_random_passes_are_refused() -> None:
    """Noise of the gradients alone, which the logits do not show."""

    class Noisy(Small):
        def forward(self, history: Tensor) -> Tensor:
            h = self.states(history)
            noise = torch.rand_like(h)
            return self.out(h + noise * (h - h.detach()))

    with pytest.raises(fk.InputError, match="off those of plain autograd"):
        fisher(shaken(Noisy()))


def test_a_kink_on_which_rounding_decides_is_no_fault() -> None:
    """A sequence alone falls on the other side, by less than the logits' own rounding."""

    class Kink(Small):
        def forward(self, history: Tensor) -> Tensor:
            h = self.states(history)
            shift = 1e-12 if len(h) > 2 else -1e-12
            return self.out(h + F.relu(h - h.detach() + shift))

    model = shaken(Kink())
    assert fisher(model, [FULL[:3]])["items.weight"].isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_tables_too_large_are_left_out_and_the_rest_is_compared(
    tied: bool, positions: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No gradient of theirs is asked for, and a wrong rule of a smaller tensor is still found."""
    from fisherkern.fisher import first_batch

    class EveryPosition(Small):
        def forward(self, history: Tensor) -> Tensor:
            return self.out(self.norm(torch.tanh(self.mix(self.items(history)))))

    kind = Small if positions == "last" else EveryPosition
    model = shaken(kind(tied))
    whole = fisher(model, positions=positions)
    monkeypatch.setattr(first_batch, "_MOST_ENTRIES", 20)  # mix has 16, the tables more
    asked: list[int] = []
    real = torch.autograd.grad

    def grad(outputs: Any, inputs: Any, *given: Any, **known: Any) -> Any:
        found = real(outputs, inputs, *given, **known)
        asked.extend(own.numel() for own in found if own is not None and known.get("allow_unused"))
        return found

    monkeypatch.setattr(first_batch.torch.autograd, "grad", grad)
    found = fisher(model, positions=positions)
    assert asked and max(own for own in asked if own) <= 20 * len(FULL) * 6
    for name, value in whole.items():
        assert torch.equal(found[name], value)
    assert "items.weight" in caplog.text and "too large to compare" in caplog.text
    add = LinearGrad.add_square_
    monkeypatch.setattr(
        LinearGrad, "add_square_", lambda self, total, delta: add(self, total, 1.5 * delta)
    )
    with pytest.raises(fk.InputError, match="gradients of 'mix.weight'"):
        fisher(model, positions=positions)


@pytest.mark.parametrize("holder", ["parameter", "table", "module", "module before"])
@pytest.mark.parametrize("change", ["clip", "double", "later", "nothing"])
def test_hooks_of_training_are_left_aside(
    holder: str, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They are not run, and are there again afterwards."""
    calls = []

    def changed(gradient: Tensor) -> Tensor | None:
        calls.append(gradient)
        scale = 2.0 if change == "double" or len(calls) > 9 else 1.0
        return None if change == "nothing" else scale * gradient.clamp(-1e-3, 1e-3)

    model = shaken(Small())
    expected = dict(fisher(model, [FULL] * 3))
    if holder == "module":
        model.mix.register_full_backward_hook(lambda _, inputs, __: (changed(inputs[0]),))
    elif holder == "module before":
        model.mix.register_full_backward_pre_hook(lambda _, outputs: (changed(outputs[0]),))
    else:
        weight = model.items.weight if holder == "table" else model.mix.weight
        weight.register_hook(changed)
    found = fisher(model, [FULL] * 3)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert not calls and "hooks on gradients are left aside" in caplog.text
    if change != "nothing":
        model(FULL).sum().backward()
        assert calls


class Clipped(Small):
    """Clips gradients within the pass: in every batch, or in those with a certain item."""

    def __init__(self, how: str, later: bool) -> None:
        super().__init__()
        self.how, self.later = how, later

    def forward(self, history: Tensor) -> Tensor:
        states = self.states(history)
        if states.requires_grad and (not self.later or (history == NUM_ITEMS).any()):
            if self.how == "function":
                return self.out(ClippedGradient.apply(states))
            states = states.clone()
            if self.how == "small":
                states.register_hook(lambda gradient: F.hardshrink(gradient, 1e-7))
            elif self.how == "norm":
                states.register_hook(lambda g: g * (100.0 / g.norm()).clamp(max=1.0))
            else:
                states.register_hook(lambda gradient: gradient.clamp(-100.0, 100.0))
        return self.out(states)


class ClippedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-100.0, 100.0)


@pytest.mark.parametrize(
    ("how", "later"),
    [("function", False), *itertools.product(("value", "norm", "small"), (False, True))],
)
def test_gradients_that_a_pass_clips_are_refused(how: str, later: bool) -> None:
    """Though nothing is clipped at the size that gradients have."""
    calm = torch.where(FULL == NUM_ITEMS, 1, FULL)
    other = calm.clone()
    other[0, 0] = NUM_ITEMS
    model = shaken(Clipped(how, later))
    if later:
        fisher(model, [calm])
    with pytest.raises(fk.InputError, match="its backward pass is no linear function"):
        fisher(model, [calm, other])


def test_a_hook_of_a_later_batch_that_mixes_sequences_is_made_up_for() -> None:
    """Each sequence alone has the gradient that it has in the check of the first batch."""

    class Mixing(Small):
        def forward(self, history: Tensor) -> Tensor:
            states = self.states(history)
            if states.requires_grad and (history == NUM_ITEMS).any():
                states = states.clone()
                states.register_hook(lambda gradient: gradient + 0.5 * (gradient.sum(0) - gradient))
            return self.out(states)

    calm = torch.where(FULL == NUM_ITEMS, 1, FULL)
    later = calm.clone()
    later[0, 0] = NUM_ITEMS
    plain = shaken(Small())
    model = Mixing()
    model.load_state_dict(plain.state_dict())
    found, expected = (dict(fisher(own, [calm, later])) for own in (model, plain))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
