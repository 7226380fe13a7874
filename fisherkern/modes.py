"""Evaluation mode for the length of a block, in one thread or several; caches go as they came."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_lock = threading.Lock()
# By id, of modules in a block of some thread: how many they are in, the mode they come from, and
# their attributes.
_modes: dict[int, tuple[int, bool, dict[str, Any]]] = {}
# What every module has.
_COMMON = frozenset(vars(nn.Module()))
# Blocks without cuDNN, and whether it was on before the first.
_without_cudnn = 0
_cudnn = True


@contextlib.contextmanager
def eval_mode(model: Any, *, gradients: bool = False) -> Iterator[None]:
    """Put every submodule into eval mode inside the block, and back into its own mode after it.

    Blocks of several threads may hold one module: it comes back after the last of them. Attributes
    with tensors that a forward pass has set come back too: an item table that a model keeps for its
    next pass is that of these weights.

    Args:
        model: A module. Anything else that can be called has no mode and is left alone.
        gradients: The block differentiates the model. Recurrent layers then run without cuDNN,
            which has no backward pass in eval mode.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    recurrent = gradients and any(isinstance(module, nn.RNNBase) for module in modules)
    with _lock:
        for module in modules:
            known = _modes.get(id(module)) or (0, module.training, _attributes(module))
            _modes[id(module)] = known[0] + 1, *known[1:]
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
                blocks, training, attributes = _modes.pop(id(module))
                if blocks > 1:
                    _modes[id(module)] = blocks - 1, training, attributes
                    continue
                _put_back(module, attributes)
                if type(module).train is not nn.Module.train:  # LoRA layers merge their weights
                    module.train(training)
                own_modes.append((module, training))
            # A module's switch has thrown those of the modules inside it.
            for module, training in own_modes:
                module.training = training
            if recurrent:
                _switch_cudnn(-1)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's own attributes, each with a copy of what a list or dictionary holds."""
    return {
        name: (value, copy.copy(value) if type(value) in (dict, list) else None)
        for name, value in vars(module).items()
        if name not in _COMMON
    }


def _put_back(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Undo changes to attributes that have to do with tensors."""
    own = vars(module)
    for name in [name for name in own if name not in _COMMON]:
        value, content = attributes.get(name, (None, None))
        if not (_holds_tensor(own[name]) or _holds_tensor(value) or _holds_tensor(content)):
            continue
        if name not in attributes:
            del own[name]
            continue
        if own[name] is not value:
            own[name] = value
        if content is not None and not _same(value, content):
            value.clear()
            value.update(content) if isinstance(value, dict) else value.extend(content)


def _entries(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value)


def _holds_tensor(value: Any) -> bool:
    if type(value) in (dict, list, tuple):
        return any(isinstance(entry, Tensor) for entry in _entries(value))
    return isinstance(value, Tensor)


def _same(one: Any, other: Any) -> bool:
    pairs = zip(_entries(one), _entries(other), strict=False)
    return len(one) == len(other) and all(a is b for a, b in pairs)


def _switch_cudnn(step: int) -> None:
    """Enter or leave a block without cuDNN: the switch is the process's, not the thread's."""
    global _without_cudnn, _cudnn
    if _without_cudnn == 0:
        _cudnn = torch.backends.cudnn.enabled
    _without_cudnn += step
    torch.backends.cudnn.enabled = _cudnn and _without_cudnn == 0
