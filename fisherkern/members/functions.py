"""Whether members are one function of their tensors, wherever a difference may stand.

A module's number of heads, activation, mask or hook shapes no tensor. Members that differ there
have no average, so every member is run once with the tensors of member 0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters import ModelAdapter
from fisherkern.adapters.agreement import distance
from fisherkern.adapters.wrappers import WITH_CODE, deep_copy
from fisherkern.errors import InputError, one_line, shown
from fisherkern.modes import eval_mode

log = logging.getLogger("fisherkern")

# What acts in training alone.
_IN_TRAINING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity)
# Numbers of PyTorch's modules that act in training alone, or are sizes that tensors show.
_NO_FUNCTION = {
    "training",
    "p",
    "dropout",
    "inplace",
    "momentum",
    "num_embeddings",
    "in_features",
    "out_features",
    "padding_idx",
    "head_dim",
    "sparse",
    "scale_grad_by_freq",
    "max_norm",
}
_PLAIN = (bool, int, float, str, tuple, type(None))


def check_functions(members: Sequence[ModelAdapter]) -> None:
    """Raise InputError where members compute other functions of the same tensors.

    Their modules of PyTorch's own are compared by their numbers, and their logits on two short
    histories, where such can be made. Nothing of a member is changed or copied but its buffers.
    """
    first = members[0]
    for number, member in enumerate(members[1:], start=1):
        if member.module is first.module:
            continue
        difference = _module_difference(first.module, member.module)
        if difference is not None:
            name, own, other = difference
            raise InputError(
                f"module {shown(name)} {other} in member {number} and {own} in member 0, which "
                "computes another function"
            )
        gap = _gap(first, member)
        if gap is not None:
            raise InputError(
                f"member {number} computes another function than member 0: with the same tensors "
                f"their logits are {gap} apart; does an attribute, a hook or a buffer that is not "
                "saved differ?"
            )


def _module_difference(first: nn.Module, other: nn.Module) -> tuple[str, str, str] | None:
    """(Name, the first's, the other's) of a module of PyTorch's own that differs."""
    named = dict(other.named_modules())
    for name, own in first.named_modules():
        if (same := named.get(name)) is None:
            continue
        if isinstance(own, WITH_CODE) and isinstance(same, WITH_CODE) and own.code != same.code:
            return name, "has one code", "has another"
        if not _is_pytorchs(own):
            continue
        if isinstance(own, _IN_TRAINING) and isinstance(same, _IN_TRAINING):
            continue
        if type(own).__qualname__ != type(same).__qualname__:  # parametrised ones have one each
            return name, f"is a {type(own).__name__}", f"is a {type(same).__name__}"
        numbers, others = _numbers(own), _numbers(same)
        for key in sorted(numbers.keys() & others.keys()):
            if numbers[key] != others[key]:
                return name, f"has {key}={shown(numbers[key])}", f"has {key}={shown(others[key])}"
    return None


def _is_pytorchs(module: nn.Module) -> bool:
    kind = type(module).__module__
    return kind.startswith("torch.nn.") and not kind.startswith("torch.nn.modules.loss")


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in _NO_FUNCTION and isinstance(value, _PLAIN)
    }


def _gap(first: ModelAdapter, other: ModelAdapter) -> str | None:
    """How far the members' logits are apart with the first's tensors; None for no difference."""
    try:
        # The first's twin too: a pass may leave something behind, as a table for the next pass.
        own, twin = (_with_tensors_of(first, member) for member in (first, other))
        with eval_mode(own.module), eval_mode(twin.module), torch.no_grad():
            for batch, again in zip(_batches(own), _batches(twin), strict=True):
                try:
                    z = own.logits(batch)
                except Exception:  # whatever a model that wants another batch may raise
                    continue
                if not z.isfinite().any() or distance(z, own.logits(batch)) is not None:
                    return None
                theirs = twin.logits(again)
                return "of another shape" if theirs.shape != z.shape else distance(z, theirs)
    except Exception as error:  # whatever another model, or a copy of it, may raise
        log.debug("the members' functions were not compared: %s", one_line(str(error), 200))
    return None


def _with_tensors_of(first: ModelAdapter, other: ModelAdapter) -> ModelAdapter:
    """Return the other member around the first's parameters, and copies of its buffers."""
    memo: dict[int, Any] = {}
    own = dict(first.module.named_parameters(remove_duplicate=False))
    for name, parameter in other.module.named_parameters(remove_duplicate=False):
        if parameter.shape != own[name].shape:
            raise ValueError(f"{name} has another shape")
        memo[id(parameter)] = own[name]
    saved = first.module.state_dict(keep_vars=True)
    for name, buffer in other.module.named_buffers():
        if isinstance(kept := saved.get(name), Tensor):
            if kept.shape != buffer.shape:
                raise ValueError(f"{name} has another shape")
            memo[id(buffer)] = kept.detach().clone()
    # The deep copy keeps what it is told stands for a tensor, and copies everything else. A
    # library's own wrapper may copy in a way of its own; functions that were given need it.
    held = other.source if other.given else other.module
    twin = ModelAdapter.made(deep_copy(held, memo), other.given)
    for name, parameter in twin.module.named_parameters(remove_duplicate=False):
        if parameter is not own[name]:
            raise ValueError(f"a copy has a {name} of its own")
    return twin


def _batches(member: ModelAdapter) -> Iterator[Any]:
    """Batches of two short histories, as the model may take them."""
    rows = [part.num_embeddings for part in member.module.modules() if type(part) is nn.Embedding]
    number = member.num_items or max(rows, default=1) - 1
    if number < 2:
        return
    for length in dict.fromkeys((min(4, member.max_len or 4), member.max_len or 4)):
        ids = torch.arange(2 * length, device=member.device).view(2, length)
        items = 1 + ids * max(number // (2 * length), 1) % number
        try:
            batch = member.make_batch(items)
        except InputError:  # a history alone is no question to this model
            return
        yield member.prepared(batch)
        yield items
