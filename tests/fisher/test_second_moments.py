"""The free Fisher: an optimiser's second moments, bias corrected, by parameter name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import NUM_ITEMS, shaken
from torch import nn

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.errors import InputError
from fisherkern.objectives.targets import next_item_cross_entropy

BATCHES = [
    (torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([3, 1])),
    (torch.tensor([[0, 0, 4], [2, 5, 1]]), torch.tensor([2, 4])),
]


def model() -> fk.SASRec:
    return shaken(fk.SASRec(NUM_ITEMS, max_len=3, dim=4, heads=1, layers=1)).double().eval()


def steps(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    """The gradients of a few steps."""
    found = []
    for batch in BATCHES:
        optimizer.zero_grad()
        next_item_cross_entropy(network, batch, "loader").backward()
        named = network.named_parameters()
        found.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        optimizer.step()
    return found


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], float]] = {
    "AdamW": (torch.optim.AdamW, {"betas": (0.9, 0.6)}, 0.6),
    "Adam, no foreach": (torch.optim.Adam, {"betas": (0.5, 0.7), "foreach": False}, 0.7),
    "NAdam": (torch.optim.NAdam, {"betas": (0.9, 0.6)}, 0.6),
    "RMSprop": (torch.optim.RMSprop, {"alpha": 0.8}, 0.8),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("compiled", [False, True])
def test_moments_are_averages_of_squared_gradients(name: str, compiled: bool) -> None:
    kind, settings, decay = OPTIMIZERS[name]
    network = model()
    optimizer = kind(network.parameters(), lr=0.01, **settings)
    gradients = steps(network, optimizer)
    given = torch.compile(network) if compiled else network
    fisher = fk.DiagFisher.from_optimizer(optimizer, given)
    assert fisher.meta["sampler"] == "optimizer" and fisher.meta["steps"] == 2
    assert list(fisher) == [parameter for parameter, _ in network.named_parameters()]
    for parameter, value in fisher.items():
        first, second = (own[parameter].square() for own in gradients)
        expected = (decay * first + second) / (1 + decay)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-14)


def test_they_merge_by_it_and_only_with_their_like(tmp_path: Path) -> None:
    members, fishers = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        members.append(model())
        optimizer = torch.optim.AdamW(members[-1].parameters())
        steps(members[-1], optimizer)
        fishers.append(fk.DiagFisher.from_optimizer(optimizer, members[-1]))
        fishers[-1].save(tmp_path / f"{seed}.safetensors")
    merged = fk.merge(members, fishers=fishers, floor=0.0, normalize=None)
    name = "item_embedding.weight"
    a, b = (dict(own.named_parameters())[name] for own in members)
    fa, fb = (own[name] for own in fishers)
    expected = torch.where(fa + fb > 0, (fa * a + fb * b) / (fa + fb), (a + b) / 2)
    torch.testing.assert_close(dict(merged.named_parameters())[name], expected)
    exact = fk.diag_fisher(members[1], [BATCHES[0][0]], progress=False)
    with pytest.raises(InputError, match="reduction='sequence' and .* reduction='optimizer'"):
        fk.merge(members, fishers=[fishers[0], exact])
    assert fk.DiagFisher.load(tmp_path / "0.safetensors").meta == fishers[0].meta


def test_what_has_no_moments_is_refused() -> None:
    network = model()
    sgd = torch.optim.SGD(network.parameters(), lr=0.1)
    steps(network, sgd)
    with pytest.raises(InputError, match="the SGD has no second moment of 'item_embedding.weight'"):
        fk.DiagFisher.from_optimizer(sgd, network)
    with pytest.raises(InputError, match="the AdamW has no second moment"):
        fk.DiagFisher.from_optimizer(torch.optim.AdamW(network.parameters()), network)
    other = model()
    adam = torch.optim.AdamW(other.parameters())
    steps(other, adam)
    with pytest.raises(InputError, match="no second moment"):
        fk.DiagFisher.from_optimizer(adam, network)


class Custom(torch.optim.Optimizer):
    """Somebody's optimiser; its state under the name of Adam's is of another kind."""

    def __init__(self, parameters: Any, change: Any, **group: Any) -> None:
        self.change = change
        super().__init__(parameters, {"betas": (0.9, 0.6), **group})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = {"step": 1, "exp_avg_sq": torch.ones_like(parameter)}
            self.state[parameter] = self.change(state) or state


@pytest.mark.parametrize(
    ("change", "group"),
    [
        (lambda state: None, {"betas": (0.9, 0.9, 0.6)}),
        (lambda state: None, {"betas": ()}),
        (lambda state: state.pop("step") and None, {}),
        (lambda state: {**state, "exp_avg_sq": state["exp_avg_sq"].byte()}, {}),
        (lambda state: {**state, "exp_avg_sq": state["exp_avg_sq"].flatten()[:1]}, {}),
        (lambda state: {"step": 1, "square_avg": state["exp_avg_sq"]}, {}),
    ],
)
def test_moments_of_another_kind_are_refused(change: Any, group: dict[str, Any]) -> None:
    network = model()
    optimizer = Custom(network.parameters(), change, **group)
    steps(network, optimizer)
    with pytest.raises(InputError, match="the Custom has no second moment"):
        fk.DiagFisher.from_optimizer(optimizer, network)


def test_what_is_no_optimiser_is_refused() -> None:
    network = model()
    for given in (None, torch.optim.Adam(network.parameters()).state_dict(), [1]):
        with pytest.raises(InputError, match="is no optimiser of PyTorch"):
            fk.DiagFisher.from_optimizer(given, network)  # type: ignore[arg-type]
    adadelta = torch.optim.Adadelta(network.parameters())
    steps(network, adadelta)
    with pytest.raises(InputError, match="the Adadelta has no second moment"):
        fk.DiagFisher.from_optimizer(adadelta, network)


@pytest.mark.parametrize(("kind", "told"), [(torch.optim.Adam, 1), (torch.optim.AdamW, 0)])
def test_weight_decay_inside_the_gradients_is_told(
    kind: Any, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    for decay in (0.0, 0.1):
        network = model()
        optimizer = kind(network.parameters(), weight_decay=decay)
        steps(network, optimizer)
        fk.DiagFisher.from_optimizer(optimizer, network)
        texts = [record.getMessage() for record in caplog.records]
        assert ["adds its weight decay" in text for text in texts] == [True] * told * (decay > 0)


def test_a_tensor_of_two_names_is_saved_twice(tmp_path: Path) -> None:
    value = torch.arange(4.0)
    fk.DiagFisher({"a": value, "b": value, "c": value[1:]}, {}).save(tmp_path / "f.safetensors")
    found = fk.DiagFisher.load(tmp_path / "f.safetensors")
    assert {name: own.tolist() for name, own in found.items()} == {
        "a": [0, 1, 2, 3], "b": [0, 1, 2, 3], "c": [1, 2, 3],
    }  # fmt: skip
    with pytest.raises(InputError, match="'a' is a list, no tensor by name"):
        fk.DiagFisher({"a": [1.0]}, {})  # type: ignore[dict-item]


def test_from_a_kept_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "fisher"
    train = "train --data synthetic --encoder SASRec --dim 4 --layers 1 --max-len 4 --epochs 1"
    train += f" --quiet --out {run}"
    assert main([*train.split(), "--keep-state"]) == 0
    checkpoint, state = run / "model.safetensors", run / "state.safetensors"
    assert main(["fisher", str(checkpoint), "--from-state", str(state), "--out", str(out)]) == 0
    fisher = fk.DiagFisher.load(out / "model.fisher.safetensors")
    network = fk.load_model(checkpoint)
    assert {n: v.shape for n, v in fisher.items()} == {
        n: p.shape for n, p in network.named_parameters()
    }
    assert fisher.meta["steps"] > 0 and fisher.meta["optimizer"] == "AdamW"
    capsys.readouterr()
    bad = {
        "not a training state": ["--from-state", str(checkpoint)],
        "--from-state computes nothing of data": ["--from-state", str(state), "--k", "3"],
    }
    for message, words in bad.items():
        assert main(["fisher", str(checkpoint), *words, "--out", str(tmp_path / "bad")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "bad").exists()
