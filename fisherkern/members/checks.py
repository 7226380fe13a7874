"""Checks of several models against each other, each fault said in one sentence."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters import ModelAdapter
from fisherkern.adapters.sharded.models import is_dtensor
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError, shown
from fisherkern.fingerprint import fingerprint
from fisherkern.members.catalogue import CatalogueUnion
from fisherkern.members.configs import differing_setting, function_settings
from fisherkern.members.functions import check_functions
from fisherkern.members.ties import Tie, find_ties, named_tensors
from fisherkern.processes import world

# What counts steps of training, and plays no part in a prediction.
_COUNTER = re.compile(
    r"(^|[._])(num_batches_tracked|n_averaged|(num_)?(steps?|updates|iterations?|iters?|epochs?"
    r"|calls|counts?|counter))$"
)


def is_counter(name: str, shape: Sequence[int]) -> bool:
    """Whether an integer buffer is one number that counts, as batch norm's does its batches."""
    return len(shape) == 0 and _COUNTER.search(name) is not None


def can_average(tensor: Tensor) -> bool:
    """Whether the values of such a tensor have an average: those of fp16 and wider, stored densely.

    An fp8 weight is a code beside its scale.
    """
    wide = tensor.is_floating_point() and tensor.element_size() > 1
    return wide and tensor.layout == torch.strided


def bare_modules(models: Sequence[Any]) -> list[nn.Module]:
    """Return the modules inside members as users hold them."""
    return [member.module for member in adapters_of(models)]


def listed(models: Any) -> list[Any]:
    """Return members as a list; raise InputError for a single one."""
    if not isinstance(models, Iterable):
        raise InputError(f"there is a {type(models).__name__} where several models were expected")
    return list(models)


def adapters_of(models: Sequence[Any]) -> list[ModelAdapter]:
    """Return the adapters of at least one member; raise InputError for what is no model."""
    if not models:
        raise InputError("there is no model to merge")
    found = []
    for number, model in enumerate(models):
        try:
            found.append(ModelAdapter.of(model))
        except InputError:
            raise InputError(
                f"member {number} is a {type(model).__name__}, not an nn.Module"
            ) from None
    return found


def check_members(models: Sequence[Any]) -> list[Tie]:
    """Return the ties of the members, which must be of one class with the same tensors and ties.

    Wrappers around them do not count.
    """
    models = bare_modules(models)
    for number, model in enumerate(models):
        if _class_name(model) != _class_name(models[0]):
            raise InputError(
                f"member {number} is a {type(model).__name__} and member 0 "
                f"a {type(models[0]).__name__}; only models of one class merge"
            )
        for name, tensor in named_tensors(model).items():
            if nn.parameter.is_lazy(tensor) or tensor.is_meta:
                raise InputError(f"member {number}: '{name}' has no values yet")
        for name, parameter in model.named_parameters():
            if is_dtensor(parameter):
                raise InputError(
                    f"member {number}: '{name}' lies over several processes; save_model writes "
                    "folders, x.dcp, that merge_files merges"
                )
    names = [set(named_tensors(model)) for model in models]
    for number, own in enumerate(names):
        for lacking, having, odd in ((number, 0, names[0] - own), (0, number, own - names[0])):
            if odd:
                raise InputError(
                    f"member {lacking} has no tensor {min(odd)!r}, which member {having} has"
                )
    ties = [find_ties(model, f"member {number}") for number, model in enumerate(models)]
    for number, own_ties in enumerate(ties):
        odd_ties = set(own_ties) ^ set(ties[0])
        if odd_ties:
            name = max(odd_ties, key=lambda tie: len(tie.aliases)).name
            raise InputError(
                f"tensor {name!r} is tied to others in one of members 0 and {number} and not, or "
                "to different ones, in the other"
            )
    return ties[0]


def _class_name(model: nn.Module) -> tuple[str, str]:
    """Of the class: a parametrised or traced module, and a notebook's cell, make it anew."""
    return type(model).__module__, type(model).__qualname__


def check_tensors(
    tensors: Sequence[Mapping[str, Tensor]], ties: Sequence[Tie], catalogue: CatalogueUnion
) -> None:
    """Check that shapes and dtypes agree, item rows apart, and that no tensor holds a NaN."""
    for tie in ties:
        movable = tie.name in catalogue.moving
        first = tensors[0][tie.name]
        for number, own in enumerate(tensors):
            tensor = own[tie.name]
            if tensor.shape[movable:] != first.shape[movable:]:
                raise InputError(
                    f"tensor {tie.name!r} has shape {tuple(tensor.shape)} in member {number} and "
                    f"{tuple(first.shape)} in member 0"
                )
            if tensor.dtype != first.dtype:
                raise InputError(
                    f"tensor {tie.name!r} is {tensor.dtype} in member {number} and {first.dtype} "
                    "in member 0"
                )
            if can_average(tensor) and tensor.isnan().any():
                raise InputError(f"tensor {tie.name!r} of member {number} holds a NaN")


def compared(models: Sequence[nn.Module], **given: Any) -> dict[str, Any]:
    """Return what processes compare of their models and arguments; nothing for one process."""
    if world() == 1:
        return {}
    return {"models": [fingerprint(model) for model in models], **given}


@contextlib.contextmanager
def renamed(old: str, new: str) -> Iterator[None]:
    """Say checks of members inside the block of something else: `new` where they name `old`."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(old, new)) from None


def check_finite(tensors: Sequence[Tensor], name: str) -> None:
    """No member's tensor `name` holds an infinity (NaN was refused before)."""
    for number, tensor in enumerate(tensors):
        if not tensor.isfinite().all():
            raise InputError(f"tensor {name!r} of member {number} holds an infinity")


def check_config(models: Sequence[Any]) -> None:
    """Check that settings agree that shape no tensor, such as the number of heads."""
    members = [ModelAdapter.of(model) for model in models]
    check_settings([_without_categories(member.settings) for member in members])
    check_functions(members)


def _without_categories(settings: Any) -> Any:
    """Return settings without the names of categories, which `align_rows` matches."""
    if not isinstance(settings, Mapping) or not isinstance(settings.get("items"), Mapping):
        return settings
    kept = {key: own for key, own in settings["items"].items() if key not in ("categories", "most")}
    return {**settings, "items": kept}


def check_settings(configs: Sequence[Any]) -> None:
    """Check the same of what the members were built with."""
    if not all(isinstance(own, Mapping) for own in configs):
        return
    # RecBole's configuration is the whole run's.
    known = [function_settings(own, of_trainer="train_batch_size" in own) for own in configs]
    for number, own in enumerate(known):
        odd = differing_setting(known[0], own)
        if odd is not None:
            key, first, other = odd
            raise InputError(
                f"member {number} was built with {key}={shown(other)} and member 0 with "
                f"{key}={shown(first)}"
            )


def check_weights(weights: Sequence[float] | Tensor | None, members: int) -> list[float]:
    """Return lambda as a list that sums to 1; None means equal weights."""
    if weights is None:
        return [1 / members] * members
    try:
        if isinstance(weights, Mapping | Set):  # which have no order, or names
            raise TypeError
        values = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise InputError(
            f"weights is {shown(weights)} where {members} numbers were expected"
        ) from None
    if len(values) != members:
        raise InputError(f"weights has {len(values)} numbers for {members} members")
    for number, weight in enumerate(values):
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"weight {number} is {weight} where at least 0 was expected")
    if math.isinf(sum(values)):
        values = [weight / 2.0**64 for weight in values]
    total = math.fsum(values)
    if total <= 0:
        raise InputError("the weights sum to 0, so no member would count")
    return [weight / total for weight in values]


def check_encoders(models: Sequence[Any], what: str) -> None:
    """Raise InputError unless all are encoders of one network."""
    for number, model in enumerate(models):
        if not (isinstance(model, SequenceEncoder) and model.one_network):
            raise InputError(
                f"{what} {number} is a {type(model).__name__}, not an encoder of one network"
            )
