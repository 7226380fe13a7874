"""Checks of what `merge` is given beside the members: method, Fishers, Gram matrices, products."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.checks import check_callable, check_count
from fisherkern.errors import InputError, shown
from fisherkern.fingerprint import buffer_hashes, fingerprint
from fisherkern.members.options import check_options
from fisherkern.members.ties import Tie
from fisherkern.merging.decay import DECAYS
from fisherkern.merging.rules import METHODS, MergeMethod


def choose_method(
    name: str | None,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    floor: float,
    normalize: str | None,
    steps: int | None,
) -> tuple[MergeMethod, dict[str, Any]]:
    """Return the method and its options, after checking that the arguments fit it."""
    weights = inputs["weights"]
    if name is None:
        name = "uniform" if weights is None else "weighted"
        name = name if inputs["fishers"] is None else "fisher"
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(f"method {shown(name)} is not one of {', '.join(METHODS)}")
    method = METHODS[name]
    if isinstance(weights, str) and weights != "search":
        known = ", ".join(map(repr, DECAYS))
        raise InputError(
            f"weights is {shown(weights)} where numbers, 'search' or one of {known} were expected"
        )
    searching = isinstance(weights, str)
    if searching and "products" in method.inputs:
        raise InputError(f"method {name!r} takes numbers as weights, not 'search'")
    for argument, value in inputs.items():
        use = method.inputs.get(argument, "no")
        if argument == "score" and use == "no":
            if searching != (value is not None):
                raise InputError(
                    "weights='search' needs score=, a function of a model whose value is to be high"
                    if searching
                    else "score= is used by weights='search' only"
                )
            continue
        if value is not None and use == "no":
            raise InputError(
                f"method {name!r} takes no {argument}{HINTS.get((name, argument), '')}"
            )
        if value is None and use == "must":
            raise InputError(f"method {name!r} needs {argument}{NEEDED[argument]}")
    real = isinstance(floor, int | float) and not isinstance(floor, bool)
    if not (real and math.isfinite(floor) and floor >= 0):
        raise InputError(f"floor is {shown(floor)} where a number of at least 0 was expected")
    if normalize not in ("mean", None):
        raise InputError(f"normalize is {shown(normalize)} where 'mean' or None was expected")
    if steps is not None:
        check_count("steps", steps, least=0)
    check_callable("score", inputs.get("score"))
    return method, check_options(name, method.options, options)


def check_paths(paths: Any) -> None:
    """Raise InputError unless these are several files, or one in a list."""
    if isinstance(paths, str | os.PathLike):
        raise InputError(f"{paths}: one file where several were expected")
    if not paths:
        raise InputError("there is no model to merge")


HINTS = {("uniform", "weights"): "; did you mean 'weighted'?"}


NEEDED = {
    "weights": ": one number per member, or 'search'",
    "fishers": ": one mapping per member, as diag_fisher makes",
    "base": ": the model that the members were trained from",
    "grams": ": one mapping per member, as linear_grams makes",
    "products": ": one function per member, as fisher_product makes",
    "score": ": a function of a model whose value is to be high",
    "validation": ": batches of histories and next items",
}


def check_mappings(
    given: Sequence[Mapping[str, Tensor]], what: str, argument: str, members: int
) -> list[Mapping[str, Tensor]]:
    """One mapping per member."""
    found = list(given)
    if len(found) != members:
        raise InputError(f"there are {len(found)} {argument} for {members} members")
    for number, mapping in enumerate(found):
        if not isinstance(mapping, Mapping):
            raise InputError(
                f"the {what} of member {number} is a {type(mapping).__name__}, not a mapping "
                "from names to tensors"
            )
    return found


def check_products(
    models: Sequence[nn.Module], products: Sequence[Any], check_fingerprint: bool
) -> None:
    """One function per member, made with it where it says so."""
    if len(products) != len(models):
        raise InputError(f"there are {len(products)} products for {len(models)} members")
    for number, product in enumerate(products):
        if not callable(product):
            kind = type(product).__name__
            raise InputError(f"the product of member {number} is a {kind}, not a function")
    if check_fingerprint:
        check_fingerprints(models, products, "product")


def check_fingerprints(
    models: Sequence[nn.Module], fishers: Sequence[Any], what: str = "Fisher"
) -> None:
    """Each Fisher that says which model it was computed on was computed on its member."""
    prints: list[str] | None = None
    for number, fisher in enumerate(fishers):
        meta = getattr(fisher, "meta", None) or {}
        expected = meta.get("fingerprint")
        if expected is None:
            continue
        prints = prints or [fingerprint(model) for model in models]
        if expected != prints[number]:
            hint = f" (it is of member {prints.index(expected)})" if expected in prints else ""
            raise InputError(
                f"the {what} of member {number} was computed on another model{hint}: its "
                f"fingerprint is {expected[:12]} and the member's {prints[number][:12]}"
            )
        if meta.get("buffers"):
            own = buffer_hashes(models[number])
            check_buffers(meta, own, f"the {what} of member {number}", "the member")


def check_buffers(
    meta: Mapping[str, Any], own: Mapping[str, str], made: str, member: object
) -> None:
    """Compare the buffers of the model that `made` is of with those of the member.

    Older files do not say them, and a member may lack some.
    """
    expected = meta.get("buffers")
    for name, value in expected.items() if isinstance(expected, Mapping) else ():
        if own.get(name, value) != value:
            raise InputError(
                f"{made} was computed on another model: buffer {shown(name)} has other values in "
                f"{member}"
            )


def check_fisher(
    fisher: Mapping[str, Tensor], tensors: Mapping[str, Tensor], ties: Sequence[Tie], member: int
) -> dict[str, Tensor]:
    """Return the Fisher by tie name, checked; a tensor it may lack (frozen) is left out."""
    whose = f"the Fisher of member {member}"
    for name in fisher:
        if name not in tensors:
            raise InputError(f"{whose} has a tensor {name!r}, which the model does not")
    found: dict[str, Tensor] = {}
    for tie in ties:
        theta = tensors[tie.name]
        # Some estimators file a tied tensor under its other name.
        names = [n for n in (tie.name, *tie.aliases) if n in fisher]
        if not names:
            if isinstance(theta, nn.Parameter) and theta.requires_grad:
                raise InputError(
                    f"{whose} has no tensor {tie.name!r}, which is trainable: "
                    "freeze it, or compute the Fisher again"
                )
            continue
        value = fisher[names[0]]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise InputError(f"tensor {names[0]!r} of {whose} is no dense tensor with values")
        if value.shape != theta.shape:
            raise InputError(
                f"tensor {names[0]!r} of {whose} has shape {tuple(value.shape)} where the model's "
                f"has {tuple(theta.shape)}"
            )
        if not value.is_floating_point():
            raise InputError(f"tensor {names[0]!r} of {whose} is {value.dtype}")
        if not torch.isfinite(value).all():
            raise InputError(f"tensor {names[0]!r} of {whose} holds a value that is not finite")
        if (value < 0).any():
            raise InputError(f"tensor {names[0]!r} of {whose} holds a negative value")
        found[tie.name] = value.detach()
    return found


def check_grams(
    grams: Sequence[Mapping[str, Tensor]],
    tensors: Sequence[Mapping[str, Tensor]],
    ties: Sequence[Tie],
) -> dict[str, list[Tensor]]:
    """Tie name -> every member's Gram matrix, for the tensors of which all members have one."""
    for number, own in enumerate(grams):
        whose = f"the Gram mapping of member {number}"
        for name, gram in own.items():
            weight = tensors[number].get(name)
            if weight is None:
                raise InputError(f"{whose} has a tensor {name!r}, which the model does not")
            width = weight.shape[-1] if weight.dim() == 2 else None
            if width is None or gram.shape != (width, width):
                raise InputError(
                    f"tensor {name!r} of {whose} has shape {tuple(gram.shape)}, which does not "
                    f"fit the model's of shape {tuple(weight.shape)}"
                )
            if not gram.is_floating_point() or not torch.isfinite(gram).all():
                raise InputError(f"tensor {name!r} of {whose} holds a value that is not finite")
            if (gram.diagonal() < 0).any():
                raise InputError(f"tensor {name!r} of {whose} has a negative diagonal entry")
    return {
        tie.name: [own[tie.name].detach() for own in grams]
        for tie in ties
        if all(tie.name in own for own in grams)
    }
