"""What can be wrong with the members, their Fishers and the options, each in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.errors import InputError
from fisherkern.fingerprint import fingerprint
from fisherkern.merging.rows import Catalogue
from fisherkern.merging.rules import RULES, Rule
from fisherkern.merging.ties import Tie, find_ties, named_tensors


def choose_rule(
    method: str | None,
    weights: Any,
    fishers: Any,
    score: Callable[[Any], float] | None,
    floor: float,
    normalize: str | None,
) -> tuple[str, Rule]:
    """The rule's name and the rule, after checking that the options fit it and one another."""
    if method is None:
        method = "uniform" if weights is None else "weighted"
        method = method if fishers is None else "fisher"
    if method not in RULES:
        raise InputError(f"method {method!r} is not one of {', '.join(RULES)}")
    rule = RULES[method]
    if weights is not None and not rule.takes_weights:
        raise InputError(f"method {method!r} takes no weights; did you mean 'weighted'?")
    if weights is None and method == "weighted":
        raise InputError("method 'weighted' needs weights: one number per member, or 'search'")
    if isinstance(weights, str) and weights != "search":
        raise InputError(f"weights is {weights!r} where numbers or 'search' were expected")
    searching = isinstance(weights, str)
    if searching != (score is not None):
        raise InputError(
            "weights='search' needs score=, a function of a model whose value is to be high"
            if searching
            else "score= is used by weights='search' only"
        )
    if (fishers is not None) != rule.takes_fishers:
        verb = "needs" if rule.takes_fishers else "takes no"
        raise InputError(f"method {method!r} {verb} fishers")
    if not (math.isfinite(floor) and floor >= 0):
        raise InputError(f"floor is {floor} where a number of at least 0 was expected")
    if normalize not in ("mean", None):
        raise InputError(f"normalize is {normalize!r} where 'mean' or None was expected")
    return method, rule


def check_weights(weights: Sequence[float] | Tensor | None, members: int) -> list[float]:
    """Lambda as a list that sums to 1; None means equal weights."""
    if weights is None:
        return [1 / members] * members
    try:
        values = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise InputError(f"weights is {weights!r} where {members} numbers were expected") from None
    if len(values) != members:
        raise InputError(f"weights has {len(values)} numbers for {members} members")
    for number, weight in enumerate(values):
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"weight {number} is {weight} where at least 0 was expected")
    total = math.fsum(values)
    if total <= 0:
        raise InputError("the weights sum to 0, so no member would count")
    return [weight / total for weight in values]


def check_members(models: Sequence[nn.Module]) -> list[Tie]:
    """The ties of the members, which must be of one class with the same tensors and ties."""
    if not models:
        raise InputError("there is no model to merge")
    for number, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise InputError(f"member {number} is a {type(model).__name__}, not an nn.Module")
        if type(model) is not type(models[0]):
            raise InputError(
                f"member {number} is a {type(model).__name__} and member 0 "
                f"a {type(models[0]).__name__}; only models of one class merge"
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


def check_tensors(
    tensors: Sequence[Mapping[str, Tensor]], ties: Sequence[Tie], catalogue: Catalogue
) -> None:
    """Shapes and dtypes agree, item rows apart, and no floating tensor holds a NaN."""
    for tie in ties:
        movable = catalogue.positions is not None and tie.name in catalogue.parameters
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
            if tensor.is_complex():
                raise InputError(f"tensor {tie.name!r} is complex, which no merge rule handles")
            if tensor.isnan().any():
                raise InputError(f"tensor {tie.name!r} of member {number} holds a NaN")


def check_finite(tensors: Sequence[Tensor], name: str) -> None:
    """No member's tensor `name` holds an infinity (NaN was refused before)."""
    for number, tensor in enumerate(tensors):
        if not tensor.isfinite().all():
            raise InputError(f"tensor {name!r} of member {number} holds an infinity")


def check_config(models: Sequence[nn.Module]) -> None:
    """Settings that shape no tensor but change the function, such as the number of heads, agree."""
    configs = [getattr(model, "config", None) for model in models]
    first = configs[0]
    for number, own in enumerate(configs):
        if not isinstance(first, dict) or not isinstance(own, dict):
            return
        for key in sorted(set(first) | set(own)):
            # These act in training only, or are what alignment is for.
            if key in ("num_items", "init_std") or "dropout" in key:
                continue
            if first.get(key) != own.get(key):
                raise InputError(
                    f"member {number} was built with {key}={own.get(key)!r} and member 0 with "
                    f"{key}={first.get(key)!r}"
                )


def check_fingerprints(models: Sequence[nn.Module], fishers: Sequence[Mapping[str, Any]]) -> None:
    """Each Fisher that says which model it was computed on was computed on its member."""
    prints: list[str] | None = None
    for number, fisher in enumerate(fishers):
        expected = (getattr(fisher, "meta", None) or {}).get("fingerprint")
        if expected is None:
            continue
        prints = prints or [fingerprint(model) for model in models]
        if expected != prints[number]:
            hint = f" (it is of member {prints.index(expected)})" if expected in prints else ""
            raise InputError(
                f"the Fisher of member {number} was computed on another model{hint}: its "
                f"fingerprint is {expected[:12]} and the member's {prints[number][:12]}"
            )


def check_fisher(
    fisher: Mapping[str, Tensor], tensors: Mapping[str, Tensor], ties: Sequence[Tie], member: int
) -> dict[str, Tensor]:
    """The Fisher by tie name, checked; a tensor it may lack (frozen) is left out."""
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
        if value.shape != theta.shape:
            raise InputError(
                f"tensor {names[0]!r} of {whose} has shape {tuple(value.shape)} where the model's "
                f"has {tuple(theta.shape)}"
            )
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise InputError(f"tensor {names[0]!r} of {whose} holds a value that is not finite")
        if (value < 0).any():
            raise InputError(f"tensor {names[0]!r} of {whose} holds a negative value")
        found[tie.name] = value.detach()
    return found
