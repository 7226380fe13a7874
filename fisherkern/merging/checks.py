"""What can be wrong with the members, their Fishers and the options, each in one sentence."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.errors import InputError
from fisherkern.fingerprint import fingerprint
from fisherkern.merging.rows import Catalogue
from fisherkern.merging.rules import RULES, Rule, check_options
from fisherkern.merging.ties import Tie, find_ties, named_tensors


def choose_rule(
    method: str | None,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    floor: float,
    normalize: str | None,
    steps: int | None,
) -> tuple[str, Rule, dict[str, Any]]:
    """The rule's name, the rule and its options, after checking that the arguments fit it."""
    weights = inputs["weights"]
    if method is None:
        method = "uniform" if weights is None else "weighted"
        method = method if inputs["fishers"] is None else "fisher"
    if method not in RULES:
        raise InputError(f"method {method!r} is not one of {', '.join(RULES)}")
    rule = RULES[method]
    if isinstance(weights, str) and weights != "search":
        raise InputError(f"weights is {weights!r} where numbers or 'search' were expected")
    searching = isinstance(weights, str)
    if searching and "products" in rule.inputs:
        raise InputError(f"method {method!r} takes numbers as weights, not 'search'")
    for name, value in inputs.items():
        use = rule.inputs.get(name, "no")
        if name == "score" and use == "no":
            if searching != (value is not None):
                raise InputError(
                    "weights='search' needs score=, a function of a model whose value is to be high"
                    if searching
                    else "score= is used by weights='search' only"
                )
            continue
        if value is not None and use == "no":
            raise InputError(f"method {method!r} takes no {name}{HINTS.get((method, name), '')}")
        if value is None and use == "must":
            raise InputError(f"method {method!r} needs {name}{NEEDED[name]}")
    if not (math.isfinite(floor) and floor >= 0):
        raise InputError(f"floor is {floor} where a number of at least 0 was expected")
    if normalize not in ("mean", None):
        raise InputError(f"normalize is {normalize!r} where 'mean' or None was expected")
    if steps is not None and steps < 0:
        raise InputError(f"steps is {steps} where a number of at least 0 was expected")
    return method, rule, check_options(method, rule, options)


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


@contextlib.contextmanager
def renamed(old: str, new: str) -> Iterator[None]:
    """Checks of members inside the block, said of something else: `new` where they name `old`."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(old, new)) from None


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
        expected = (getattr(fisher, "meta", None) or {}).get("fingerprint")
        if expected is None:
            continue
        prints = prints or [fingerprint(model) for model in models]
        if expected != prints[number]:
            hint = f" (it is of member {prints.index(expected)})" if expected in prints else ""
            raise InputError(
                f"the {what} of member {number} was computed on another model{hint}: its "
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
