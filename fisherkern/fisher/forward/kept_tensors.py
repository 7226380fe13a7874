"""Finding what a model keeps of its parameters from one pass to the next: caches of its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.adapters.agreement import batch_norm_refused, logits_of
from fisherkern.errors import InputError
from fisherkern.fisher.autocast import Autocast
from fisherkern.fisher.forward.dependence import tensors_in
from fisherkern.fisher.forward.plain_run import NormGuard, buffers_kept
from fisherkern.modes import attributes_kept, holds, train_mode_alone


class _Pass(TorchFunctionMode):
    """A pass under watch: what comes from elsewhere, and what is made of parameters.

    Tensors are known by their storage: a view or an alias counts as the tensor.
    """

    def __init__(self, function: Callable[[Any], Tensor], batch: Any, module: nn.Module) -> None:
        super().__init__()
        self._known = {_key(t) for t in (*module.parameters(), *tensors_in(batch))}
        self.trainable = {_key(p) for p in module.parameters() if p.requires_grad}
        # By id: views of those that the pass makes.
        self._views: dict[int, Tensor] = {}
        # By storage: tensors of elsewhere, and tensors made with parameters, held so that nothing
        # else comes to stand there.
        self._foreign: dict[int, Tensor] = {}
        self.of_parameters: dict[int, Tensor] = {}
        # By storage: those of `_foreign` that went into it.
        self._sources: dict[int, frozenset[int]] = {}
        with torch.enable_grad(), NormGuard(), self:
            result = function(batch)
        reached = self._sources.get(_key(result), frozenset())
        self.foreign = {key: t for key, t in self._foreign.items() if key in reached}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        inputs = list(tensors_in([*args, *(kwargs or {}).values()], 3))
        sources: frozenset[int] = frozenset()
        for tensor in inputs:
            key = _key(tensor)
            old_view = key in self.trainable and not tensor.requires_grad
            if key not in self._known or (old_view and id(tensor) not in self._views):
                self._known.add(key)
                self._foreign[key], self._sources[key] = tensor, frozenset([key])
            sources |= self._sources.get(key, frozenset())
        output = func(*args, **kwargs or {})
        made = output if output is not None or not args else args[0]  # written in place
        for tensor in tensors_in(made, 2):
            self._made(tensor, inputs, sources)
        return output

    def _differentiated(self, tensor: Tensor) -> bool:
        key = _key(tensor)
        return tensor.requires_grad or key in self.trainable or key in self.of_parameters

    def _made(self, tensor: Tensor, inputs: list[Tensor], sources: frozenset[int]) -> None:
        """Note a call's output."""
        key = _key(tensor)
        self._known.add(key)
        if key in self.trainable:
            self._views[id(tensor)] = tensor
        others = [own for own in inputs if _key(own) != key]
        if tensor.is_floating_point() and any(map(self._differentiated, others)):
            self.of_parameters.setdefault(key, tensor)
            # A tensor of its own, made without gradients of what has one.
            if not tensor.requires_grad and len(others) == len(inputs):
                self._foreign[key], sources = tensor, sources | {key}
        self._sources[key] = sources


def fresh_passes(model: ModelAdapter, batch: Any, autocast: Autocast) -> ModelAdapter:
    """Return a model that keeps no tensor with a gradient from one pass to the next.

    Three passes at most: two of the model as it is, and, where its logits depend on tensors of
    elsewhere, one in training mode, in which a cache that an earlier pass made is computed anew.

    Args:
        model: The model, in evaluation mode.
        batch: A few sequences.
        autocast: The caller's.

    Raises:
        InputError: The logits depend on parameters through a tensor of an earlier pass, whatever
            attributes are put back.
    """
    module, again = model.module, False
    with buffers_kept(module), attributes_kept(module), autocast.on():
        with batch_norm_refused():
            first, second = (_Pass(partial(logits_of, model), batch, module) for _ in range(2))
        for key, tensor in second.foreign.items():
            place = _place(module, key)
            made = key in first.of_parameters and key not in second.of_parameters
            if made and tensor.requires_grad and place is not None:
                again = True
            elif made or (key in first.foreign and tensor.grad_fn is not None):
                _refuse(tensor, place)
        # What nobody saw being made is not of an earlier pass for that.
        old = first.foreign.keys() | second.of_parameters.keys() | second.trainable
        own = [
            t
            for key, t in second.foreign.items()
            if key in old and not t.requires_grad and _varies(t)
        ]
        for tensor in _remade(model.logits, batch, module, own):
            _refuse(tensor, _place(module, _key(tensor)), _key(tensor) in second.of_parameters)

    if not again:
        return model

    def fresh(function: Any) -> Any:
        def called(*args: Any) -> Any:
            with attributes_kept(module):
                return function(*args)

        return None if function is None else called

    return dataclasses.replace(
        model,
        all_logits=fresh(model.all_logits),
        all_hidden=fresh(model.all_hidden),
        head=fresh(model.head),
    )


def _remade(
    function: Callable[[Any], Tensor], batch: Any, module: nn.Module, kept: list[Tensor]
) -> Iterator[Tensor]:
    """Tensors that a pass in training mode makes of parameters, or has as such, in their stead."""
    with train_mode_alone(module) as alone:
        if not (alone and kept):
            return
        try:
            trained = _Pass(function, batch, module)
        except Exception:  # a model in training mode may ask for more than a history
            return
        made = [*module.parameters(), *trained.of_parameters.values()]
        for tensor in kept:
            alike = [own.requires_grad for own in made if _alike(tensor, own)]
            if alike and all(alike) and _key(tensor) not in trained.foreign:
                yield tensor


def _key(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # of tensors that are made of others
        return id(tensor)


def _varies(tensor: Tensor) -> bool:
    dense = tensor.layout is torch.strided and tensor.is_floating_point() and tensor.numel() > 1
    return dense and bool((wide := tensor.float()).amin() < wide.amax())


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.device != other.device or one.layout != other.layout:
        return False
    gap = (one.detach().float() - other.detach().float()).abs().max()
    return bool(gap <= 1e-3 * one.detach().float().abs().max())


def _place(module: nn.Module, key: int) -> str | None:
    """Return the attribute that holds a tensor, or one that shares its storage."""
    for prefix, own in module.named_modules():
        for name, value in holds(own):
            if any(_key(tensor) == key for tensor in value):
                return f"{prefix}.{name}".strip(".")
    return None


def _refuse(tensor: Tensor, place: str | None, anew: bool = False) -> None:
    kept = "a tensor that no attribute holds" if place is None else f"'{place}'"
    if anew:
        kept = "a tensor"
        made = "evaluation mode makes of its parameters without gradients, and training mode with"
    else:
        made = "an earlier pass made of its parameters"
    raise InputError(
        f"model: its logits depend on {kept} {tuple(tensor.shape)} that {made}, so the Fisher "
        "would miss those gradients; let every pass compute it with its gradients"
    )
