"""Training: it learns, it resumes bit for bit, its settings are checked."""

import os

import pytest
import safetensors.torch
import torch
from training_runs import Cycles, T, V, assert_same_bits, bits, new_model, run

from fisherkern.encoders import BERT4Rec
from fisherkern.errors import InputError
from fisherkern.objectives import MaskedItems
from fisherkern.training import TrainingLog, save_model
from fisherkern.training.settings import learning_rate


def test_it_learns_what_follows_what():
    model, log = run(
        model=new_model(dropout=0.0),
        data=Cycles(64),
        batch_size=32,
        epochs=100,
        lr=1e-2,
        weight_decay=0.0,
        schedule="constant",
        objective=MaskedItems(0.2, last_ratio=0.5),
    )
    assert isinstance(log, TrainingLog) and len(log.losses) == 100 and log.steps == 200
    # ln 20 = 3.0 is the loss of knowing nothing.
    assert log.losses[0] > 2.8 and log.losses[-1] < 1.0
    assert not model.training
    first = torch.arange(V)[:, None]
    following = model((first + torch.arange(T - 1)) % V + 1).argmax(dim=1) + 1
    right = following == (first[:, 0] + T - 1) % V + 1
    assert right.double().mean() >= 0.7  # by chance 0.05


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    state = torch.get_rng_state()
    first, log = run()
    torch.manual_seed(99)
    again, log_again = run()
    assert_same_bits(bits(first), bits(again))
    assert log.losses == log_again.losses
    other, _ = run(seed=6)
    assert not torch.equal(other.output_bias, first.output_bias)
    torch.set_rng_state(state)


def test_the_callers_generators_are_left_alone():
    model = new_model()
    before = torch.get_rng_state()
    run(model=model)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_and_masks_are_drawn_from_different_seeds():
    seeds = []

    class Recorder(MaskedItems):
        def __call__(self, model, tokens, generator):
            seeds.append((torch.initial_seed(), generator.initial_seed()))
            return super().__call__(model, tokens, generator)

    run(epochs=2, objective=Recorder())
    assert len({seed for pair in seeds for seed in pair}) == 2 * 6


@pytest.mark.parametrize("save_every", [1, 2])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_resume_after_an_interrupt_gives_the_same_bits(tmp_path, stop, save_every):
    whole, log = run(tmp_path / "whole", save_every=save_every)

    def interrupt(epoch, model, loss):
        if epoch == stop:
            raise KeyboardInterrupt

    model = new_model()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", model=model, on_epoch=interrupt, save_every=save_every)
    # The interrupt came before the epoch was saved.
    saved = (stop - 1) // save_every * save_every
    if saved == 0:
        assert not (tmp_path / "cut").exists()
        model = new_model()
    # Otherwise the interrupted model may be trained on: the state replaces what it holds.
    epochs = []
    _, log_cut = run(
        tmp_path / "cut",
        model=model,
        on_epoch=lambda epoch, *_: epochs.append(epoch),
        save_every=save_every,
    )
    assert epochs == list(range(saved + 1, 7))
    assert log_cut.losses == log.losses and log_cut.steps == log.steps
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_run_cut_while_it_writes_its_state_goes_on_from_the_one_before(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    save_file = safetensors.torch.save_file
    calls: list[int] = []

    def cut(tensors, path, metadata):
        save_file(tensors, path, metadata)
        calls.append(1)
        if len(calls) == 3:
            os.truncate(path, os.path.getsize(path) // 2)
            raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    epochs: list[int] = []
    run(tmp_path / "cut", on_epoch=lambda epoch, *_: epochs.append(epoch))
    assert epochs == [3, 4, 5, 6]
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_finished_run_is_loaded_and_returned_at_once(tmp_path):
    whole, log = run(tmp_path / "state")
    fresh, called = new_model(), []
    _, again = run(tmp_path / "state", model=fresh, on_epoch=lambda *_: called.append(1))
    assert not called
    assert again.losses == log.losses and again.steps == log.steps
    assert_same_bits(bits(fresh), bits(whole))
    assert fresh.item_ids == Cycles.item_ids and not fresh.training


def test_a_run_without_state_has_the_bits_of_one_with(tmp_path):
    assert_same_bits(bits(run()[0]), bits(run(tmp_path / "state")[0]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": 1e-4}, "lr = 0.003, not 0.0001"),
        ({"epochs": 7}, "epochs = 6, not 7"),
        ({"seed": 6}, "seed = 5, not 6"),
        ({"clip": None}, "clip = 5.0, not None"),
        ({"crop": "last"}, "crop = 'random', not 'last'"),
        ({"objective": MaskedItems(0.3)}, "objective.ratio = 0.2, not 0.3"),
        ({"data": Cycles(name="others")}, "data = 'cycles', not 'others'"),
        ({"model": new_model(dropout=0.3)}, "model.attention_dropout = 0.2, not 0.3"),
    ],
)
def test_a_state_of_another_run_is_refused(tmp_path, changes, message):
    run(tmp_path / "state")
    with pytest.raises(InputError, match=message):
        run(tmp_path / "state", **changes)


def test_a_file_that_is_no_state_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_model(new_model(), path)
    with pytest.raises(InputError, match="not a training state"):
        run(path)
    run(tmp_path / "state")
    part = (tmp_path / "state").read_bytes()[:-5]
    (tmp_path / "state").write_bytes(part)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        run(tmp_path / "state")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"max_len": T + 1}, "max_len = 9 exceeds the model's 8"),
        ({"max_len": 0}, "max_len must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
        ({"schedule": "cosine"}, "got 'cosine'"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more and finite, got -0.1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"clip": 0.0}, "clip must be positive and finite"),
        ({"betas": (0.9, 1.0)}, "betas must be in"),
        ({"model": BERT4Rec(V + 1, T, dim=16)}, "data has 20 items, the model 21"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        run(**changes)


def test_windows_are_asked_for_as_the_settings_say():
    data = Cycles()
    run(data=data, epochs=2, crop="last", max_len=5, seed=3)
    assert set(data.asked) == {(16, 5, 3, 1, "last"), (16, 5, 3, 2, "last")}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_diverges_is_stopped(tmp_path, what):
    class Diverging(MaskedItems):
        def __call__(self, model, tokens, generator):
            loss = super().__call__(model, tokens, generator)
            calls.append(1)
            if len(calls) < 5:
                return loss
            if what == "loss":
                return loss + float("inf")  # its gradient is finite
            return loss + (model.output_bias.sum() * 0).sqrt()  # 0, with an infinite slope

    calls: list[int] = []
    model = new_model()
    with pytest.raises(InputError, match=r"diverged at step 4 with lr = 0\.00\d+: loss"):
        run(tmp_path / "state", model=model, objective=Diverging())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_learning_rates():
    def rates(schedule, warmup):
        return [learning_rate(step, 10, 1.0, schedule, warmup) for step in range(11)]

    assert rates("constant", 0) == [1.0] * 11
    assert rates("constant", 4) == [0.25, 0.5, 0.75] + [1.0] * 8
    assert rates("linear", 0) == pytest.approx([1 - step / 10 for step in range(11)])
    assert rates("linear", 4)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates("linear", 4)[4:] == pytest.approx([1 - step / 6 for step in range(7)])
    assert rates("linear", 0)[10] == 0.0
    assert learning_rate(2, 2, 1.0, "linear", 5) == pytest.approx(0.6)


def test_the_optimizer_steps_at_the_scheduled_rate():
    model, start = new_model(), new_model()
    run(model=model, epochs=1, batch_size=48, lr=1e-2, warmup_steps=10, weight_decay=0.0)
    # The first step of Adam moves every entry by its rate, here lr / 10, or less.
    moved = (model.output_bias - start.output_bias).abs().max().item()
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_gradients_are_clipped_and_decay_spares_vectors():
    model, _ = run(epochs=1, clip=1e-3)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() <= 1e-3 * 1.001
    # A tiny learning rate and a huge decay: what shrinks is what decays.
    model, start = new_model(), new_model()
    with torch.no_grad():
        model.output_bias.fill_(1.0)
    run(model=model, epochs=1, lr=1e-7, schedule="constant", warmup_steps=0, weight_decay=1e6)
    for (name, parameter), before in zip(model.named_parameters(), start.parameters(), strict=True):
        if parameter.ndim == 2:
            assert parameter.norm() < 0.8 * before.norm(), name
        elif name != "output_bias":
            assert torch.allclose(parameter, before, atol=1e-5), name
    assert (model.output_bias - 1).abs().max() < 1e-5


def test_progress_goes_to_stderr_or_nowhere(capsys):
    run(epochs=1, progress=True)
    captured = capsys.readouterr()
    assert "epoch 1/1" in captured.err and "loss=" in captured.err and not captured.out
    run(epochs=1)
    assert capsys.readouterr() == ("", "")
