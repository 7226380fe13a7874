"""The Fishers that callbacks keep: tried after one step, written beside the checkpoint."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import fisherkern as fk
from benchmarks.libraries import oracle
from benchmarks.libraries.wrapped_models import plain
from fisherkern.training.kept_fishers import KeptFishers


def trained(kind: Any = torch.optim.AdamW, steps: int = 3) -> tuple[Any, Any, list[Any]]:
    """A member, its optimizer, and each step's gradients."""
    member = plain(0)
    optimizer, gradients = kind(member.module.parameters(), lr=0.01), []
    for batch in itertools.islice(itertools.cycle(member.batches), steps):
        optimizer.zero_grad()
        logits = member.module(batch)
        torch.nn.functional.cross_entropy(logits, batch["target"]).backward()
        gradients.append({n: p.grad.clone() for n, p in member.module.named_parameters()})
        optimizer.step()
    return member, optimizer, gradients


def moving_average(gradients: list[Any], name: str, decay: float = 0.999) -> torch.Tensor:
    """The second moment after the steps, by its recursion, bias corrected."""
    moment = torch.zeros_like(gradients[0][name])
    for step in gradients:
        moment = decay * moment + (1 - decay) * step[name].square()
    return moment / (1 - decay ** len(gradients))


def test_the_files_hold_both_fishers(tmp_path: Path) -> None:
    member, optimizer, gradients = trained()
    kept = KeptFishers(member.batches, tmp_path / "own", sampler="exact", progress=False)
    kept.write(optimizer, member.model, tmp_path / "unused")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    free = fk.DiagFisher.load(tmp_path / "own" / "optimizer.fisher.safetensors")
    for name, value in free.items():
        torch.testing.assert_close(value, moving_average(gradients, name), rtol=1e-10, atol=0)
    exact = fk.DiagFisher.load(tmp_path / "own" / "exact.fisher.safetensors")
    expected = oracle.fishers_by_definition(member.module, member.logits, member.batches, 1)
    assert oracle.worst(exact, expected["exact"])[0] < 1e-9
    assert exact.meta["fingerprint"] == free.meta["fingerprint"]


def test_accelerates_wrapper_is_taken_off(tmp_path: Path) -> None:
    member, optimizer, _ = trained()

    class AcceleratedOptimizer(torch.optim.Optimizer):
        def __init__(self) -> None:
            self.optimizer = optimizer

        state = property(lambda self: self.optimizer.state)
        param_groups = property(lambda self: self.optimizer.param_groups)

    KeptFishers().write(AcceleratedOptimizer(), member.model, tmp_path)
    (path,) = tmp_path.iterdir()
    assert fk.DiagFisher.load(path).meta["optimizer"] == "AdamW"


def test_what_is_wrong_shows_after_one_step() -> None:
    member, sgd, _ = trained(torch.optim.SGD)
    with pytest.raises(fk.InputError, match="the SGD has no second moment"):
        KeptFishers().try_once(sgd, member.model)
    member, adam, _ = trained()
    with pytest.raises(fk.InputError, match="sampler: 'none' is not one of"):
        KeptFishers(member.batches, sampler="none").try_once(adam, member.model)
    with pytest.raises(fk.InputError, match="loader: it gave no sequences"):
        KeptFishers([]).try_once(adam, member.model)
    with pytest.raises(fk.InputError, match="k: an argument of diag_fisher, which needs a loader"):
        KeptFishers(sampler="exact", k=3)


def test_trying_takes_one_batch_once_and_no_draw_of_the_training() -> None:
    member, adam, _ = trained()
    taken = []

    class Loader:
        def __iter__(self):
            for batch in member.batches:
                taken.append(torch.rand(1))
                yield batch

    kept = KeptFishers(Loader(), sampler="model", k=2)
    member.module.train()
    before, weights = torch.get_rng_state(), member.module.state_dict()
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    kept.try_once(adam, member.model)
    kept.try_once(adam, member.model)
    assert len(taken) == 1 and torch.equal(torch.get_rng_state(), before)
    assert member.module.training
    for name, tensor in member.module.state_dict().items():
        assert torch.equal(tensor, weights[name])
