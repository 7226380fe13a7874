"""Evaluation mode for the length of a block, in one thread or several."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_lock = threading.Lock()
# By id, of modules in a block of some thread: how many they are in, and the mode they come from.
_modes: dict[int, tuple[int, bool]] = {}
# Blocks without cuDNN, and whether it was on before the first.
_without_cudnn = 0
_cudnn = True


@contextlib.contextmanager
def eval_mode(model: Any, *, gradients: bool = False) -> Iterator[None]:
    """Put every submodule into eval mode inside the block, and back into its own mode after it.

    Blocks of several threads may hold one module: it comes back after the last of them.

    Args:
        model: A module. Anything else that can be called has no mode and is left alone.
        gradients: The block differentiates the model. Recurrent layers then run without cuDNN,
            which has no backward pass in eval mode.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    recurrent = gradients and any(isinstance(module, nn.RNNBase) for module in modules)
    with _lock:
        for module in modules:
            blocks, training = _modes.get(id(module), (0, module.training))
            _modes[id(module)] = blocks + 1, training
        try:
            if modules:
                model.eval()
        except NotImplementedError:  # an exported program's modules have their mode and no switch
            for module in modules:
                module.training = False
        if recurrent:
            _switch_cudnn(1)
    try:
        yield
    finally:
        own_modes = []
        with _lock:
            for module in modules:
                blocks, training = _modes.pop(id(module))
                if blocks > 1:
                    _modes[id(module)] = blocks - 1, training
                    continue
                if type(module).train is not nn.Module.train:  # LoRA layers merge their weights
                    module.train(training)
                own_modes.append((module, training))
            # A module's switch has thrown those of the modules inside it.
            for module, training in own_modes:
                module.training = training
            if recurrent:
                _switch_cudnn(-1)


def _switch_cudnn(step: int) -> None:
    """Enter or leave a block without cuDNN: the switch is the process's, not the thread's."""
    global _without_cudnn, _cudnn
    if _without_cudnn == 0:
        _cudnn = torch.backends.cudnn.enabled
    _without_cudnn += step
    torch.backends.cudnn.enabled = _cudnn and _without_cudnn == 0
