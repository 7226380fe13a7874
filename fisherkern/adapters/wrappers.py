"""Wrappers around a model: taken off for the work, put back around its result."""

from __future__ import annotations

import copy
import dis
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx
from torch import nn

from fisherkern.errors import InputError

# Where objects that are no modules keep one: RecTools' models, trainers.
_HELD = ("torch_model", "lightning_model", "_model", "model", "module")
# Where modules that only pass a call on keep theirs: torch.compile, then DDP, DataParallel and
# AveragedModel, then RecTools' Lightning module.
_PASSED_ON = ("_orig_mod", "module", "torch_model")
_DEEPEST = 8
# Modules of torch's classes whose own code says what they compute.
WITH_CODE = (torch.jit.ScriptModule, torch.fx.GraphModule)
# What byte code does that is more than to call and to return.
_COMPUTES = ("BINARY", "UNARY", "COMPARE", "FOR_ITER", "STORE", "LOAD_GLOBAL", "IMPORT")


def unwrap(model: Any, known: Callable[[nn.Module], bool]) -> tuple[nn.Module, tuple[str, ...]]:
    """Find the bare module inside a model as a user holds it.

    Args:
        model: A module, or an object that holds one.
        known: Whether a module is a recommender in itself, so that one that holds nothing
            else and only hands its calls on is its wrapper.

    Returns:
        The bare module, and the attributes that lead to it.

    Raises:
        InputError: There is no module in it.
    """
    path: tuple[str, ...] = ()
    given = model
    while len(path) < _DEEPEST and (name := _wrapped(model, known)) is not None:
        model, path = getattr(model, name), (*path, name)
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, got {type(given).__name__}")
    return model, path


def copy_wrapped(source: Any, path: tuple[str, ...]) -> tuple[Any, nn.Module]:
    """Copy a model as a user holds it; returns the copy and the bare module inside it.

    Raises:
        InputError: The model cannot be copied.
    """
    try:
        duplicate = deep_copy(source, {})
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"model: a {type(source).__name__} cannot be copied ({reason[:120]}); remove hooks and "
            "old weight or spectral norms (torch.nn.utils.remove_weight_norm), or give the module "
            "inside"
        ) from None
    module = duplicate
    for name in path:
        module = getattr(module, name)
    return duplicate, module


def deep_copy(model: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`, but for functions among attributes: those that hold a part hold its copy.

    A module may score by `self.out = lambda h: h @ self.items.weight.T`, which `deepcopy` leaves
    with the tensors of the original.
    """
    duplicate = copy.deepcopy(model, memo)
    for part in duplicate.modules() if isinstance(duplicate, nn.Module) else ():
        for name, function in list(vars(part).items()):
            if not isinstance(function, types.FunctionType) or not function.__closure__:
                continue
            cells = tuple(_copied(cell, memo) for cell in function.__closure__)
            if all(map(operator.is_, cells, function.__closure__)):
                continue
            bound = types.FunctionType(
                function.__code__, function.__globals__, name, function.__defaults__, cells
            )
            bound.__kwdefaults__ = function.__kwdefaults__
            vars(part)[name] = bound
    return duplicate


def _copied(cell: types.CellType, memo: dict[int, Any]) -> types.CellType:
    try:
        held = cell.cell_contents
    except ValueError:  # it is empty
        return cell
    part = isinstance(held, (nn.Module, torch.Tensor)) and id(held) in memo
    return types.CellType(memo[id(held)]) if part else cell


def held_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module, then the one with all of its tensors, and so on, with prefixes."""
    prefix = ""
    for _ in range(_DEEPEST):
        yield prefix, module
        name = _only_trained_child(module)
        if name is None:
            return
        module, prefix = getattr(module, name), f"{prefix}{name}."


def _wrapped(model: Any, known: Callable[[nn.Module], bool]) -> str | None:
    """Return the attribute under which a wrapper holds its model; None for a bare module."""
    if not isinstance(model, nn.Module):
        held = (name for name in _HELD if isinstance(_attribute(model, name), nn.Module))
        return next(held, None)
    if (name := _passed_on(model)) is not None or known(model):
        return name
    name = _only_trained_child(model)
    if name is None or not any(known(inner) for _, inner in held_modules(getattr(model, name))):
        return None
    return name if _is_driven(model) or _hands_on(model, name) else None


def _attribute(model: Any, name: str) -> Any:
    try:
        return getattr(model, name, None)
    except Exception:  # a property of a model that is not fitted yet may raise anything
        return None


def _passed_on(model: nn.Module) -> str | None:
    """Return the child that a wrapper of torch or RecTools passes every call to."""
    of_torch = type(model).__module__.partition(".")[0] == "torch"
    of_torch = of_torch and not isinstance(model, WITH_CODE)
    children = dict(model.named_children())
    for name in _PASSED_ON:
        child = children.get(name)
        if child is None or not (of_torch or name in ("_orig_mod", "torch_model")):
            continue
        if of_torch or _only_trained_child(model) == name:
            return name
    return None


def _only_trained_child(model: nn.Module) -> str | None:
    """Return the child that holds all of a module's tensors; None where no single one does."""
    if model._parameters or any(buffer is not None for buffer in model._buffers.values()):
        return None
    holding = [name for name, child in model.named_children() if _holds_tensors(child)]
    return holding[0] if len(holding) == 1 else None


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _is_driven(model: nn.Module) -> bool:
    """Whether a training loop drives the module, as Lightning does its modules."""
    return callable(getattr(model, "training_step", None))


def _hands_on(model: nn.Module, name: str) -> bool:
    """Whether `forward` gives its arguments to a child and returns what that returns.

    Read from its byte code: it calls once, and names nothing but the child.
    """
    code = getattr(type(model).forward, "__code__", None)
    if code is None or set(code.co_names) != {name}:
        return False
    steps = [step.opname for step in dis.get_instructions(code)]
    calls = sum(step in ("CALL", "CALL_FUNCTION_EX", "CALL_KW") for step in steps)
    return calls == 1 and not any(step.startswith(_COMPUTES) for step in steps)
