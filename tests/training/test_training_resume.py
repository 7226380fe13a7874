"""A run goes on to the same bits from wherever it was stopped, SIGKILL amid a save included.

Run as a script, `python test_training_resume.py FOLDER`, it makes runs and kills them.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_runs import Cycles, assert_same_bits, bits, new_model, run

from fisherkern.errors import InputError
from fisherkern.files import read_tensors, save_tensors
from fisherkern.objectives import MaskedItems
from fisherkern.training import load_model, save_model, state

FULL = {"ema": 0.9, "patience": 3, "epochs": 4}


class WithHead(MaskedItems):
    """Masked items plus a loss with a trained part of its own, left out of every third step."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__(0.3)
        torch.manual_seed(1)
        object.__setattr__(self, "head", nn.Linear(16, 1))
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "calls", [])

    def modules(self):
        return {"head": self.head}

    def __call__(self, model, tokens, generator) -> Tensor:
        self.calls.append(float(torch.rand((), generator=generator)))
        if self.stop == len(self.calls):
            raise KeyboardInterrupt
        loss = super().__call__(model, tokens, generator)
        if self.calls[-1] < 0.4:
            return loss
        return loss + self.head(model.encode(tokens[:, :-1])).square().mean()


def scored(model) -> float:
    """A score that goes up and down, and depends on nothing but the weights."""
    return float(model.output_bias.detach().double().abs().sum().mul(7e2).sin())


def full_run(state: Path, stop: int | None = None, **changes):
    return run(state, objective=WithHead(stop), validate=scored, **(FULL | changes))


@pytest.mark.parametrize(("every", "stops"), [(1, range(1, 13)), (5, (3, 6, 8, 12))])
def test_interrupted_before_any_step_the_state_ends_up_the_same(
    tmp_path: Path, every: int, stops: Sequence[int]
) -> None:
    """4 epochs of 3 steps; what is trained, averaged, and best so far all come back."""
    whole, log = full_run(tmp_path / "whole")
    assert log.steps == 12 and 1 < log.best_epoch < 4
    for stop in stops:
        cut = tmp_path / f"cut {stop}"
        with pytest.raises(KeyboardInterrupt):
            full_run(cut, stop, save_every_steps=every, save_every=100)
        done = (stop - 1) // every * every
        assert cut.exists() == (done > 0)
        objective = WithHead()
        model, again = run(cut, objective=objective, validate=scored, **FULL)
        assert len(objective.calls) == 12 - done
        assert cut.read_bytes() == (tmp_path / "whole").read_bytes(), stop
        assert_same_bits(bits(model), bits(whole))
        assert_same_bits(bits(again.ema), bits(log.ema))
        assert (again.losses, again.scores, again.best_epoch) == (
            log.losses,
            log.scores,
            log.best_epoch,
        )


def test_a_copy_of_a_trained_model_goes_on_from_where_it_was_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What trained a base and a member in one process finds the base in its file in the next."""
    base, _ = full_run(tmp_path / "base")
    save_model(base, tmp_path / "base.safetensors")
    with pytest.raises(KeyboardInterrupt):
        full_run(tmp_path / "member", 7, model=copy.deepcopy(base), seed=1)
    whole, _ = full_run(tmp_path / "whole", model=copy.deepcopy(base), seed=1)
    # As another process does: nothing is known of models of this one.
    monkeypatch.setattr(state, "_starts", type(state._starts)())
    again, _ = full_run(
        tmp_path / "member", model=load_model(tmp_path / "base.safetensors"), seed=1
    )
    assert_same_bits(bits(again), bits(whole))


def test_saving_by_time_and_by_steps_changes_no_bit(tmp_path: Path) -> None:
    full_run(tmp_path / "epochs")
    full_run(tmp_path / "seconds", save_every_seconds=1e-9)
    full_run(tmp_path / "steps", save_every_steps=2)
    expected = (tmp_path / "epochs").read_bytes()
    assert (tmp_path / "seconds").read_bytes() == expected
    assert (tmp_path / "steps").read_bytes() == expected
    with pytest.raises(KeyboardInterrupt):
        full_run(tmp_path / "cut", 5, save_every_seconds=1e-9)
    assert read_tensors(tmp_path / "cut")[1]["progress"]["step"] == 4
    with pytest.raises(KeyboardInterrupt):
        full_run(tmp_path / "late", 5, save_every_seconds=1e9)
    assert read_tensors(tmp_path / "late")[1]["progress"]["step"] == 3


def test_the_state_holds_what_the_objective_trains_and_the_model_file_does_not(
    tmp_path: Path,
) -> None:
    objective = WithHead()
    before = objective.head.weight.detach().clone()
    model, _ = run(tmp_path / "state", objective=objective)
    assert not torch.equal(objective.head.weight, before)
    tensors, header = read_tensors(tmp_path / "state")
    assert torch.equal(tensors["objective.head.weight"], objective.head.weight)
    assert tensors["steps.model.output_bias"].item() == 18
    assert 0 < tensors["steps.objective.head.bias"].item() < 18
    save_model(model, tmp_path / "model.safetensors")
    assert not [name for name in read_tensors(tmp_path / "model.safetensors")[0] if "head" in name]
    # Nothing of the time or the place is in it.
    assert set(header) == {"kind", "run", "progress"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("best.ema.output_bias"), "'best.ema.output_bias' is missing"),
        (lambda tensors: tensors.pop("objective.head.bias"), "'objective.head.bias' is missing"),
        (lambda tensors: tensors.update(other=torch.zeros(1)), "'other' is not part"),
        (
            lambda tensors: tensors.update({"exp_avg.model.output_bias": torch.zeros(1)}),
            r"'exp_avg.model.output_bias' has shape \(1,\), not \(20,\)",
        ),
        (
            lambda tensors: tensors.pop("exp_avg.model.output_bias"),
            "'exp_avg.model.output_bias' is m",
        ),
    ],
)
def test_a_state_with_wrong_tensors_is_named(tmp_path: Path, change, message: str) -> None:
    full_run(tmp_path / "state")
    tensors, header = read_tensors(tmp_path / "state")
    change(tensors)
    save_tensors(tmp_path / "state", tensors, header)
    model = new_model()
    start = bits(model)
    with pytest.raises(InputError, match=f"state: tensor {message}"):
        full_run(tmp_path / "state", model=model)
    assert_same_bits(bits(model), start)


def killed_run(folder: Path, pause: float) -> None:
    """A run that saves after every step, and a model file; `pause` seconds in each step."""

    class Slow(MaskedItems):
        def __call__(self, model, tokens, generator):
            time.sleep(pause)
            return super().__call__(model, tokens, generator)

    model, log = run(
        folder / "state",
        objective=Slow(0.2),
        data=Cycles(16 * 4),
        epochs=4,
        save_every_steps=1,
        ema=0.99,
        validate=scored,
    )
    save_model(model, folder / "model.safetensors")
    assert log.ema is not None
    save_model(log.ema, folder / "ema.safetensors")


def make_and_kill(folder: Path) -> int:
    """Kill a run at random moments until one comes through; how many were killed."""
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            killed_run(folder / "killed", 0.002)
            os._exit(0)
        # The first ones die young. Later ones live longer, so that it comes to an end.
        deadline = time.monotonic() + random.uniform(0, 0.1 * 1.5**kills)
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                assert status == 0
                return kills
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        state = folder / "killed" / "state"
        if state.exists():
            read_tensors(state)  # whole, whatever the moment


def test_killed_at_random_moments_the_files_end_up_the_same(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    names = ["ema.json", "ema.safetensors", "model.json", "model.safetensors", "state"]
    assert sorted(os.listdir(tmp_path / "killed")) == names
    for name in names:
        killed = (tmp_path / "killed" / name).read_bytes()
        assert killed == (tmp_path / "whole" / name).read_bytes(), name


def test_a_part_that_is_shared_is_saved_once(tmp_path: Path) -> None:
    """An objective may hold a part of the model as its own: one parameter, one AdamW step."""

    class Sharing(MaskedItems):
        def __init__(self, model) -> None:
            super().__init__(0.3)
            object.__setattr__(self, "model", model)

        def modules(self):
            return {"shared": self.model.transform}

    model = new_model()
    run(tmp_path / "shared", model=model, objective=Sharing(model))
    other, _ = run(objective=MaskedItems(0.3))
    assert_same_bits(bits(model), bits(other))
    again = new_model()
    run(tmp_path / "shared", model=again, objective=Sharing(again))
    assert_same_bits(bits(again), bits(other))


if __name__ == "__main__":
    kills = make_and_kill(Path(sys.argv[1]))
    killed_run(Path(sys.argv[1]) / "whole", 0.0)
    print(kills)
