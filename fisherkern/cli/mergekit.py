"""Recipes of mergekit, as far as there is a method of ours for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisherkern.errors import InputError, shown

KEYS = ("models", "merge_method", "base_model", "parameters", "dtype")
OUTPUT_DTYPES = ("float32", "float16", "bfloat16", "float64")
# Method -> (the parameters of one model, those of all).
PARAMETERS = {
    "linear": (("weight",), ("weight", "normalize", "int8_mask")),
    "slerp": ((), ("t",)),
    "task_arithmetic": (("weight",), ("weight", "normalize", "lambda", "int8_mask")),
    "ties": (("weight", "density"), ("weight", "density", "normalize", "lambda", "int8_mask")),
    "model_stock": ((), ("filter_wise", "int8_mask")),
    "dare_linear": (
        ("weight", "density"),
        ("weight", "density", "normalize", "lambda", "rescale", "int8_mask"),
    ),
}
# What mergekit normalises by default.
NORMALIZED = ("linear", "ties")


def is_mergekit(content: Mapping[str, Any]) -> bool:
    """Whether a recipe is one of mergekit's."""
    return "merge_method" in content or "models" in content or "slices" in content


def from_mergekit(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Recipe` that a recipe of mergekit stands for.

    Task vectors are summed there by weights that need not sum to 1: scale is lambda times the sum,
    over the number of members. Trimming is by tensor.

    Args:
        path: Of the recipe, for messages; models are looked for beside it first.
        content: The YAML's content.

    Raises:
        InputError: Something has no counterpart; the message names it.
    """
    _check(path, content, KEYS, "the recipe")
    method = content.get("merge_method")
    if method not in PARAMETERS:
        known = ", ".join(PARAMETERS)
        raise InputError(f"{path}: merge_method {shown(method)} has no counterpart; {known} have")
    of_model, of_all = PARAMETERS[method]
    common = content.get("parameters") or {}
    _check(path, common, of_all, f"'parameters' of {method}")
    values = {key: _value(path, key, value) for key, value in common.items()}
    models = _models(path, content.get("models"), of_model)
    base = content.get("base_model")
    found: dict[str, Any] = {"dtype": _dtype(path, content.get("dtype"))}
    if method == "linear":
        if base is not None:
            raise InputError(f"{path}: 'base_model' is nothing that linear uses")
    elif not isinstance(base, str):
        raise InputError(f"{path}: {method} needs a 'base_model'")
    else:
        base = _place(path, base)
    if method == "slerp":
        return found | _slerp(path, [model for model, _ in models], base, values)
    if method == "model_stock":
        return found | _model_stock(path, [model for model, _ in models], base, values)
    members = [(model, own) for model, own in models if model != base or own]
    if any(model == base for model, _ in members):
        raise InputError(f"{path}: 'base_model' is no member of {method}: it has no task vector")
    own: dict[str, list[Any]] = {
        key: [{**values, **parameters}.get(key) for _, parameters in members]
        for key in ("weight", "density")
    }
    if not members or None in own["weight"]:
        raise InputError(f"{path}: every model needs a 'weight'")
    found |= {"members": [model for model, _ in members], "weights": own["weight"]}
    total, normalize = sum(own["weight"]), values.get("normalize", method in NORMALIZED)
    if method == "linear":
        if not normalize and abs(total - 1) > 1e-9:
            raise InputError(f"{path}: 'normalize' is false, and the weights sum to {total:g}")
        return found | {"method": "weighted"}
    if values.get("rescale") is False:
        raise InputError(f"{path}: 'rescale' is false, and ours always rescales")
    if method == "ties" and not normalize:
        raise InputError(f"{path}: 'normalize' is false, and our ties always normalises")
    scale = values.get("lambda", 1.0)
    if method != "ties":
        scale = scale * (1.0 if normalize else total) / len(members)
    options: dict[str, Any] = {"scale": scale}
    if "density" in of_model:
        densities = set(own["density"])
        if len(densities) > 1:
            raise InputError(f"{path}: the models have several values of 'density', ours has one")
        options["density"] = densities.pop() or 1.0
    if method == "ties":
        options["per"] = "tensor"
    return found | {
        "method": {"dare_linear": "dare"}.get(method, method),
        "base": base,
        "options": options,
    }


def _slerp(
    path: Path, models: list[Path], base: Path | None, values: Mapping[str, Any]
) -> dict[str, Any]:
    others = [model for model in models if model != base]
    if "t" not in values or len(others) != 1 or base is None:
        raise InputError(f"{path}: slerp needs a number 't', and one model beside 'base_model'")
    t = values["t"]
    return {"method": "slerp", "members": [base, others[0]], "weights": [1 - t, t]}


def _model_stock(
    path: Path, models: list[Path], base: Path | None, values: Mapping[str, Any]
) -> dict[str, Any]:
    if values.get("filter_wise"):
        raise InputError(f"{path}: 'filter_wise' is true, and ours has one angle a tensor")
    others = [model for model in models if model != base]
    return {"method": "model_stock", "members": others, "base": base}


def _models(path: Path, content: Any, known: tuple[str, ...]) -> list[tuple[Path, dict[str, Any]]]:
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: 'models' must be a list of mappings with a key 'model'")
    found = []
    for number, entry in enumerate(content):
        where = f"'models' entry {number}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
            raise InputError(f"{path}: {where} has no 'model', the name of a checkpoint")
        _check(path, entry, ("model", "parameters"), where)
        parameters = entry.get("parameters") or {}
        _check(path, parameters, known, f"'parameters' of {where}")
        values = {key: _value(path, key, value) for key, value in parameters.items()}
        found.append((_place(path, entry["model"]), values))
    return found


def _check(path: Path, mapping: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(mapping, Mapping):
        raise InputError(f"{path}: {where} must be a mapping, is {shown(mapping)}")
    for key in mapping:
        if key not in known:
            raise InputError(f"{path}: {shown(key)} of {where} is not understood")


def _value(path: Path, key: str, value: Any) -> Any:
    switch = key in ("normalize", "rescale", "int8_mask", "filter_wise")
    if isinstance(value, bool) != switch or not isinstance(value, int | float):
        expected = "true or false" if switch else "one number for all layers"
        raise InputError(f"{path}: {shown(key)} is {shown(value)} where {expected} was expected")
    return value


def _dtype(path: Path, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value in OUTPUT_DTYPES):
        return value
    raise InputError(
        f"{path}: 'dtype' is {shown(value)} where one of {', '.join(OUTPUT_DTYPES)} was expected"
    )


def _place(path: Path, name: str) -> Path:
    """Return a checkpoint beside the recipe, or where mergekit would look for it."""
    beside = path.parent / name
    return beside if beside.exists() or not Path(name).exists() else Path(name)
