"""merge(method="auto"): every method that the arguments allow, and every member alone, by score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from fisherkern.errors import InputError
from fisherkern.merging.rules import METHODS
from fisherkern.merging.scores import finite_score

ModelT = TypeVar("ModelT")

_DATA = ("fishers", "base", "grams", "products", "validation")


def merge_auto(
    merge: Callable[..., ModelT],
    models: Sequence[ModelT],
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> ModelT:
    """Return the candidate with the highest `score`: never worse there than the best member alone.

    Tried are each member (in the united catalogue, where catalogues differ), and each method in
    `METHODS` whose inputs are given: with equal lambda where it knows none, else with those that
    weights="search" finds. The first of equals wins, members before methods. The search scores some
    40 models per method and more with many members. Keeps two models at a time.

    Args:
        merge: The function of that name.
        models: Its members.
        inputs: Its arguments that methods use, by name.
        settings: Its other arguments.

    Returns:
        The winner. Its `merge_report` ("single" for a member) also has `auto`: score, and per
        candidate its method, weights and score.

    Raises:
        InputError: `score` is missing or not finite, or there are `weights` or `options`.
    """
    score = inputs["score"]
    if score is None:
        raise InputError("method 'auto' needs score: a function of a model whose value is high")
    if inputs["weights"] is not None:
        raise InputError("method 'auto' takes no weights: it looks for them")
    if settings.get("options") is not None:
        raise InputError("method 'auto' takes no options: they are of one method each")
    if isinstance(inputs["validation"], Iterator):
        inputs = {**inputs, "validation": list(inputs["validation"])}
    best: ModelT | None = None
    best_score = -math.inf
    tried: list[dict[str, Any]] = []
    for name, arguments in _candidates(len(models), inputs):
        model = merge(models, **{**settings, **arguments})
        value = finite_score(score, model, f"of candidate {name!r}")
        report: dict[str, Any] = model.merge_report  # type: ignore[attr-defined]
        report["method"] = name
        tried.append({"method": name, "weights": report["weights"], "score": value})
        if best is None or value > best_score:
            best, best_score = model, value
    assert best is not None
    best.merge_report["auto"] = {"score": best_score, "candidates": tried}  # type: ignore
    return best


def _candidates(members: int, inputs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(Name, arguments of `merge`) of each; members first, so that they win ties."""
    for member in range(members):
        vertex = [float(number == member) for number in range(members)]
        yield "single", {"method": "weighted", "weights": vertex}
    given = {name for name in _DATA if inputs[name] is not None}
    for name, method in METHODS.items():
        needed = {kind for kind, use in method.inputs.items() if use == "must" and kind in _DATA}
        if not needed <= given:
            continue
        used = {kind: inputs[kind] for kind in given if kind in method.inputs}
        if method.takes_weights and "products" not in method.inputs:
            used |= {"weights": "search", "score": inputs["score"]}
        elif method.inputs.get("score") == "must":
            used["score"] = inputs["score"]
        yield name, {"method": name, **used}
