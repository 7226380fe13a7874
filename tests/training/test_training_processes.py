"""Two processes give the single process's result, over gloo.

Run as a script, `python test_training_processes.py FOLDER RANK WORLD`, it is one of them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from training_runs import Cycles, T, V, bits, new_model, run

from fisherkern.encoders import GRU4Rec, SASRec
from fisherkern.files import read_json, read_tensors, save_tensors
from fisherkern.objectives import CL4SRec, MaskedItems, NextItem, VREx, batch_loss
from fisherkern.objectives.batch_loss import local_slice
from fisherkern.objectives.scoring import LOCAL_SLICE, softmax_loss
from fisherkern.training import TrainingLog


class WithHead(MaskedItems):
    """Masked items and a trained part of the objective's own, unused in some steps."""

    def __init__(self) -> None:
        super().__init__(0.3)
        torch.manual_seed(1)
        object.__setattr__(self, "head", nn.Linear(16, 1).double())

    def modules(self):
        return {"head": self.head}

    def __call__(self, model, tokens, generator):
        used = torch.rand((), generator=generator) > 0.4
        loss = super().__call__(model, tokens, generator)
        if used:
            loss = loss + self.head(model.encode({"history": tokens[:, 1:]})).square().mean()
        return loss


class Stops(MaskedItems):
    """Masked items until the loss was asked for so often."""

    def __init__(self, calls: int) -> None:
        super().__init__(0.3)
        object.__setattr__(self, "left", [calls])

    def __call__(self, model, tokens, generator):
        self.left[0] -= 1
        if self.left[0] == 0:
            raise KeyboardInterrupt
        return super().__call__(model, tokens, generator)


def stopped(folder: Path | None, calls: int) -> tuple[nn.Module, int]:
    """A run saved in a folder after every second step; the model, and the steps made here."""
    objective = Stops(calls)
    saving = {"save_every_steps": 2, "save_every_seconds": 0.02, "save_every": 2}
    model, _ = run(folder, objective=objective, epochs=3, ema=0.9, **saving)
    return model, calls - objective.left[0]


def sasrec() -> SASRec:
    torch.manual_seed(0)
    return SASRec(V, T, dim=16, dropout=0.0)


def gru4rec() -> GRU4Rec:
    torch.manual_seed(0)
    return GRU4Rec(V, T, dim=16, dropout=0.0)


# 46 windows in batches of 15: shares differ, and of the last batch, one row, a process has none.
CASES: dict[str, Any] = {
    "masked": lambda: (new_model(dropout=0.0), MaskedItems(0.4)),
    "with a head": lambda: (new_model(dropout=0.0), WithHead()),
    "next": lambda: (sasrec(), NextItem()),
    "in-batch negatives": lambda: (sasrec(), NextItem() + 0.5 * CL4SRec()),
    "masked with views": lambda: (new_model(dropout=0.0), MaskedItems(0.2) + 0.5 * CL4SRec()),
    "environments": lambda: (sasrec(), VREx(NextItem(), 5.0) + 0.5 * CL4SRec()),
    "sampled": lambda: (gru4rec(), NextItem(loss="bce", negatives=5)),
}


def train_case(name: str, folder: Path, **changes: Any) -> tuple[nn.Module, TrainingLog, list[int]]:
    """One run in float64, where rounding is far below what an optimiser step could make of it."""
    model, objective = CASES[name]()
    calls: list[int] = []

    def validate(model):
        calls.append(1)
        return -abs(len(calls) - 2.0)

    model, log = run(
        folder / "state",
        model=model.double(),
        objective=objective,
        data=Cycles(46),
        batch_size=15,
        validate=validate,
        **({"epochs": 3, "ema": 0.9, "patience": 2} | changes),
    )
    return model, log, calls


def one_of_several(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    for name in CASES:
        case = folder / name
        case.mkdir(exist_ok=True)
        model, log, calls = train_case(name, case)
        tensors = bits(model) | {f"ema {n}": t for n, t in log.ema.state_dict().items()}
        about = {
            "losses": log.losses,
            "scores": list(log.scores.values()),
            "best": log.best_epoch,
            "validations": len(calls),
        }
        save_tensors(case / f"rank{rank}", tensors, about)
    with contextlib.suppress(KeyboardInterrupt):
        stopped(folder / "run.dcp", 6)
    halfway = read_json(folder / "run.dcp" / "fisherkern.json")["progress"]["step"]
    resumed, whole = stopped(folder / "run.dcp", -1), stopped(None, -1)
    for name, (model, steps) in (("resumed", resumed), ("whole", whole)):
        about = {"halfway": halfway, "steps": steps}
        save_tensors(folder / f"{name}{rank}", bits(model), about)
    # Each process drops out other units: the seeds differ, those of the draws do not.
    seeds = []

    class Seeds(MaskedItems):
        def __call__(self, model, tokens, generator):
            seeds.append([torch.initial_seed(), generator.initial_seed()])
            return super().__call__(model, tokens, generator)

    run(objective=Seeds(0.2), epochs=1)
    save_tensors(folder / f"seeds{rank}", {}, {"seeds": [[str(s) for s in pair] for pair in seeds]})
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two processes ran every case."""
    folder, world = tmp_path_factory.mktemp("processes"), 2
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank), str(world)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    for process in started:
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0, printed
    return folder


@pytest.mark.parametrize("name", CASES)
def test_they_give_the_single_process_s_result(name: str, together: Path, tmp_path: Path) -> None:
    model, log, calls = train_case(name, tmp_path)
    expected = bits(model) | {f"ema {n}": t for n, t in log.ema.state_dict().items()}
    ranks = sorted((together / name).glob("rank*"))
    for path in ranks:
        tensors, about = read_tensors(path)
        assert about["losses"] == pytest.approx(log.losses, rel=1e-10)
        assert about["scores"] == list(log.scores.values()) and about["best"] == log.best_epoch == 2
        # Process 0 alone validates.
        assert about["validations"] == (len(calls) if path.name == "rank0" else 0)
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            assert (tensor - expected[key]).abs().max() < 1e-7, key
    first = read_tensors(ranks[0])[0]
    for path in ranks[1:]:
        for key, tensor in read_tensors(path)[0].items():
            assert torch.equal(tensor, first[key]), key
    # The state of several is that of one, and a single process may go on from it.
    state = read_tensors(together / name / "state")[1]
    assert state["run"] == read_tensors(tmp_path / "state")[1]["run"]
    again, after, _ = train_case(name, together / name)
    assert after.steps == log.steps
    for key, tensor in bits(again).items():
        assert torch.equal(tensor, first[key]), key


def test_a_folder_is_gone_on_from_to_the_same_bits(together: Path) -> None:
    """By the same processes; the finished run is read by one as well."""
    whole, _ = read_tensors(together / "whole0")
    for rank in (0, 1):
        resumed, about = read_tensors(together / f"resumed{rank}")
        assert about["halfway"] > 0 and about["halfway"] + about["steps"] == 9
        assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    alone, steps = stopped(together / "run.dcp", -1)
    assert steps == 0
    assert all(torch.equal(tensor, whole[name]) for name, tensor in bits(alone).items())


def test_a_folder_of_one_process(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "run.dcp", 6)
    assert (tmp_path / "run.dcp" / ".metadata").is_file()
    (whole, all_steps), (resumed, steps) = stopped(None, -1), stopped(tmp_path / "run.dcp", -1)
    assert 0 < steps < all_steps == 9
    assert all(torch.equal(bits(resumed)[name], own) for name, own in bits(whole).items())


def test_they_drop_out_apart_and_draw_alike(together: Path) -> None:
    seeds = [read_tensors(path)[1]["seeds"] for path in sorted(together.glob("seeds*"))]
    for step in zip(*seeds, strict=True):
        dropout, draws = zip(*step, strict=True)
        assert len(set(dropout)) == len(seeds) and len(set(draws)) == 1


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_places_are_shared_out(world: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is scored once, and the mean over the processes is the loss of all."""
    torch.manual_seed(count)
    h = torch.randn(count, 3, dtype=torch.float64, requires_grad=True)
    weight, column = torch.randn(5, 3, dtype=torch.float64), torch.randint(5, (count,))
    whole = softmax_loss(h, column, weight, None)
    (expected,) = torch.autograd.grad(whole, h)
    losses, gradients, scored = [], [], []
    monkeypatch.setattr(batch_loss, "world", lambda: world)
    token = LOCAL_SLICE.set(local_slice)
    for rank in range(world):
        monkeypatch.setattr(batch_loss, "rank", lambda rank=rank: rank)
        losses.append(softmax_loss(h, column, weight, None))
        gradients += torch.autograd.grad(losses[-1], h)
        places, factor = local_slice(count)
        scored += list(range(count))[places] if factor else []
    LOCAL_SLICE.reset(token)
    assert scored == list(range(count))
    assert torch.allclose(torch.stack(losses).mean(), whole, rtol=1e-12)
    assert torch.allclose(torch.stack(gradients).mean(dim=0), expected, rtol=1e-12)


if __name__ == "__main__":
    one_of_several(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
