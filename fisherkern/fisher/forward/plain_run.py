"""Running a model eagerly and with its whole graph, whatever it asks for by itself."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisherkern.errors import InputError

log = logging.getLogger("fisherkern")

_lock = threading.Lock()
_running = 0
_changes = contextlib.ExitStack()


class _NoCheckpoint:
    """In the place of `CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _no_checkpoint(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In the place of the generator around a checkpoint without reentry."""
    yield


_STAND_INS = {
    "CheckpointFunction": _NoCheckpoint,
    "_checkpoint_without_reentrant_generator": _no_checkpoint,
}


def _change_torch() -> None:
    for name, stand_in in _STAND_INS.items():
        _changes.callback(setattr, checkpointing, name, getattr(checkpointing, name))
        setattr(checkpointing, name, stand_in)
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import takes seconds
        _changes.enter_context(torch.compiler.set_stance("force_eager"))


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Let `torch.utils.checkpoint` keep everything, and compiled parts run uncompiled.

    A checkpoint's second computation would run without the capture and save other tensors than
    the first, once for every block of probes; a reentrant one has no gradient to its inputs at
    all. A compiler would trace the capture. Other threads have it so too in the meantime: the
    same numbers, for more memory or time.
    """
    global _running
    with _lock:
        if _running == 0:
            _change_torch()
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if _running == 0:
                _changes.close()


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back the buffers that forward passes inside the block change: counters, caches."""
    before = [
        (module._buffers, name, buffer, _version(buffer), buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for holder, name, buffer, version, value in before:
            # Batch norm writes its statistics without a new version.
            dense = buffer.layout is torch.strided
            if _version(buffer) != version or (dense and not torch.equal(buffer, value)):
                with torch.no_grad():
                    buffer.copy_(value)
            holder[name] = buffer


@contextlib.contextmanager
def hooks_aside(model: nn.Module) -> Iterator[None]:
    """Take the hooks on gradients off parameters and modules: clipping is the training's.

    Those that a pass puts on its own tensors are part of the model.
    """
    holders = [
        *((f"module {name!r}", module._backward_hooks) for name, module in model.named_modules()),
        *((f"module {name!r}", own._backward_pre_hooks) for name, own in model.named_modules()),
        *((repr(name), own._backward_hooks or {}) for name, own in model.named_parameters()),
    ]
    saved = [(name, hooks, dict(hooks)) for name, hooks in holders if hooks]
    if saved:
        names = ", ".join(name for name, _, _ in saved[:3])
        log.warning("hooks on gradients are left aside, of %s", names)
    for _, hooks, _ in saved:
        hooks.clear()
    try:
        yield
    finally:
        for _, hooks, content in saved:
            hooks.update(content)


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """`buffers_kept`, with `hooks_aside`."""
    with buffers_kept(model), hooks_aside(model):
        yield


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class NormGuard(TorchFunctionMode):
    """Refuses lookups that would shorten rows of their table, the user's weights, in place."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return func(*args, **without_max_norm(args, kwargs or {}))


def without_max_norm(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keywords of a lookup that changes nothing; of any other call those that it has."""
    if kwargs.get("max_norm") is None:
        return kwargs
    rows = args[1].detach()[args[0]]
    norms = torch.linalg.vector_norm(rows.float(), kwargs.get("norm_type", 2.0), dim=-1)
    # PyTorch leaves a row at the norm, but for its rounding, as it is.
    if bool((norms > kwargs["max_norm"] * (1 + 1e-6)).any()):
        raise InputError(
            "model: an embedding with max_norm would change its weights in the forward pass;"
            " shorten its rows and set max_norm to None"
        )
    return {**kwargs, "max_norm": None}
