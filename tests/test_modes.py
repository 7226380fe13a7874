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
