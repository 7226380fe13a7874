"""Evaluation mode for a block: every submodule comes back as it was."""

import pytest
import torch
from torch import nn

from fisherkern.modes import eval_mode


def test_modes_come_back_after_an_error_too():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before == [True, True, False, False]


class Merging(nn.Linear):
    """Its evaluation mode is another weight, as that of a LoRA layer."""

    def train(self, mode=True):
        if mode != self.training:
            self.weight.data += -1 if mode else 1
        return super().train(mode)


def test_what_a_modules_own_switch_changes_comes_back():
    model = nn.Sequential(Merging(2, 2), nn.Sequential(nn.Dropout()))
    model[1].eval()
    before = model[0].weight.clone()
    for training in (True, False):
        model.training = training
        with eval_mode(model):
            assert not torch.equal(model[0].weight, before)
        assert [module.training for module in model.modules()] == [training, True, False, False]
        assert (model[0].weight - before).abs().max() < 1e-6


class Keeping(nn.Linear):
    """It keeps its normed rows for the next pass, in three ways."""

    def __init__(self, *args):
        super().__init__(*args)
        self.rows, self.named, self.calls = None, {}, 0

    def forward(self, x):
        self.calls += 1
        self.rows = self.weight / self.weight.norm() if self.rows is None else self.rows
        self.named["rows"] = self.late = self.rows
        return x @ self.rows.T


def test_what_a_pass_leaves_behind_goes():
    model = nn.Sequential(Keeping(2, 2), nn.GRU(2, 2))
    named, flat = model[0].named, list(model[1]._flat_weights)
    with torch.no_grad(), eval_mode(model):
        model(torch.ones(3, 2))
    assert model[0].rows is None
    assert model[0].named is named
    assert named == {}
    assert not hasattr(model[0], "late")
    assert model[0].calls == 0
    assert all(a is b for a, b in zip(model[1]._flat_weights, flat, strict=True))


def test_exported_programs_run_in_their_own_mode():
    module = torch.export.export(
        nn.Sequential(nn.Linear(2, 2)).eval(), (torch.ones(3, 2),)
    ).module()
    with eval_mode(module):
        assert module(torch.ones(3, 2)).shape == (3, 2)


def test_what_is_no_module_is_left_alone():
    with eval_mode(len):
        pass


@pytest.mark.parametrize("gradients", [False, True])
def test_recurrences_run_without_cudnn_where_they_are_differentiated(gradients):
    enabled = torch.backends.cudnn.enabled
    with eval_mode(nn.GRU(2, 2), gradients=gradients):
        assert torch.backends.cudnn.enabled == (enabled and not gradients)
    with eval_mode(nn.Linear(2, 2), gradients=gradients):
        assert torch.backends.cudnn.enabled == enabled
    assert torch.backends.cudnn.enabled == enabled
