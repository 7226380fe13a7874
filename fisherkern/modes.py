"""Evaluation mode for the length of a block, in one thread or several; caches go as they came."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_lock = threading.RLock()
# By id, of modules in a block of some thread: how many they are in, the mode they come from, and
# their attributes.
_modes: dict[int, tuple[int, bool, dict[str, Any]]] = {}
# What every module has; a buffer may be a cache, None before it is filled.
_COMMON = frozenset(vars(nn.Module())) - {"_buffers"}
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


def _put_back(module: nn.Module, attributes: dict[str, Any], every: bool = False) -> None:
    """Undo changes to attributes, of a module in which one that has to do with tensors changed.

    `every`: of any module. What says whether a cache is filled is put back with the cache.
    """
    own = vars(module)
    changed = [
        name
        for name in (own.keys() | attributes.keys()) - _COMMON
        if name not in own or name not in attributes or not _unchanged(own[name], *attributes[name])
    ]
    if not every and not any(
        _holds_tensor(value)
        for name in changed
        for value in (own.get(name), *attributes.get(name, ()))
    ):
        return
    for name in changed:
        if name not in attributes:
            del own[name]
            continue
        own[name], content = attributes[name]
        if content is not None:
            own[name].clear()
            own[name].update(content) if isinstance(content, dict) else own[name].extend(content)


def holds(module: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield a module's own attributes that hold tensors, its buffers among them, and these."""
    named = {name: value for name, value in vars(module).items() if name not in _COMMON}
    buffers = named.pop("_buffers", {})  # a dictionary, but of a scripted module
    for name, value in [*named.items(), *buffers.items()]:
        if _holds_tensor(value):
            entries = _entries(value) if type(value) in (dict, list, tuple) else [value]
            yield name, [entry for entry in entries if isinstance(entry, Tensor)]


@contextlib.contextmanager
def attributes_kept(model: nn.Module, every: bool = False) -> Iterator[None]:
    """Put attributes back after the block as `eval_mode` does; `every`: whatever changed."""
    before = [(module, _attributes(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            _put_back(module, attributes, every)


@contextlib.contextmanager
def train_mode_alone(model: nn.Module) -> Iterator[bool]:
    """Put a model of one `eval_mode` block into training mode, its attributes and buffers kept.

    Gives whether this is so: not where a block of another thread holds the model. No other block
    begins meanwhile. Random numbers are drawn aside.
    """
    modules = list(model.modules())
    with _lock:
        if any(_modes.get(id(module), (0,))[0] != 1 for module in modules):
            yield False
            return
        devices = {p.device for p in model.parameters() if p.is_cuda}
        modes = [module.training for module in modules]
        with torch.random.fork_rng(devices), attributes_kept(model, every=True):
            for module in modules:
                module.training = True
            try:
                yield True
            finally:
                for module, mode in zip(modules, modes, strict=True):
                    module.training = mode


def _entries(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value)


def _holds_tensor(value: Any) -> bool:
    if type(value) in (dict, list, tuple):
        return any(isinstance(entry, Tensor) for entry in _entries(value))
    return isinstance(value, Tensor)


def _unchanged(now: Any, value: Any, content: Any) -> bool:
    """Whether an attribute is the value that it was, with the content that it had."""
    if content is None or now is not value:
        return now is value
    if isinstance(value, dict) and list(value) != list(content):
        return False
    pairs = zip(_entries(value), _entries(content), strict=False)
    return len(value) == len(content) and all(a is b for a, b in pairs)


def _switch_cudnn(step: int) -> None:
    """Enter or leave a block without cuDNN: the switch is the process's, not the thread's."""
    global _without_cudnn, _cudnn
    if _without_cudnn == 0:
        _cudnn = torch.backends.cudnn.enabled
    _without_cudnn += step
    torch.backends.cudnn.enabled = _cudnn and _without_cudnn == 0
