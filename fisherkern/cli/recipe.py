"""A merge written down: what `fisherkern merge` does, from flags or from a YAML file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fisherkern.errors import InputError


@dataclass
class Recipe:
    """The members and everything that `fisherkern merge` hands to `merge`."""

    members: list[Path]
    fishers: list[Path] = field(default_factory=list)
    base: Path | None = None
    method: str | None = None
    weights: list[float] | str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    floor: float = 0.1
    normalize: str | None = "mean"
    steps: int | None = None
    seed: int = 0
    data: str | None = None
    limit: int = 512
    batch_size: int = 128
    out: Path | None = None


KEYS = tuple(name for name in Recipe.__dataclass_fields__ if name != "fishers")
MEMBER_KEYS = ("model", "fisher", "weight")


def from_flags(options: argparse.Namespace) -> Recipe:
    """The recipe that the command's flags describe."""
    if not options.checkpoints:
        raise InputError("checkpoints: name the members' files, or a --recipe")
    return Recipe(
        members=options.checkpoints,
        fishers=options.fisher or [],
        base=options.base,
        method=options.method,
        weights=weights_from(options.weights),
        options=dict(_assignment(text) for text in options.option or []),
        floor=Recipe.floor if options.floor is None else options.floor,
        steps=options.steps,
        seed=options.seed,
        data=options.data,
        limit=Recipe.limit if options.limit is None else options.limit,
        out=options.out,
    )


def weights_from(text: str | None) -> list[float] | str | None:
    if text is None or text == "search":
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--weights: {text!r} is neither numbers nor 'search'") from None


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"--option: {text!r} is not like density=0.2")
    return name, _number_or_text(value)


def _number_or_text(value: Any) -> Any:
    """Text that stands for a number as that: YAML takes 1e-3 for text."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


class _Loader(yaml.SafeLoader):
    """YAML of plain values, in which no key may stand twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise InputError(f":{key_node.start_mark.line + 1}: the key {key!r} is not a word")
        if key in seen:
            raise InputError(f":{key_node.start_mark.line + 1}: the key {key!r} stands here twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def from_file(path: Path) -> Recipe:
    """The recipe in a YAML file; paths in it are relative to its folder.

        members:                    # files, or mappings of model, fisher and weight
          - {model: m1.safetensors, fisher: m1.fisher.safetensors}
          - {model: m2.safetensors, fisher: m2.fisher.safetensors}
        method: fisher
        options: {group: row}
        weights: search
        data: ml-1m
        out: merged

    Raises InputError, naming the file and the key, for anything else.
    """
    content = _read(path)
    for key in content:
        if key not in KEYS:
            raise InputError(f"{path}: there is no key {key!r}; it may have {', '.join(KEYS)}")
    if "members" not in content:
        raise InputError(f"{path}: it has no key 'members', the list of models to merge")
    recipe = Recipe([])
    weights = _read_members(path, content.pop("members"), recipe)
    if weights and "weights" in content:
        raise InputError(f"{path}: 'weights' and the members' 'weight' say the same; keep one")
    if weights:
        recipe.weights = weights
    for key, value in content.items():
        setattr(recipe, key, _checked(path, key, value))
    return recipe


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError as error:
        raise InputError(f"{path}{error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: could not be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{path}{line}: not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a mapping with the keys {', '.join(KEYS)}")
    return content


def _read_members(path: Path, members: Any, recipe: Recipe) -> list[float]:
    """Fill in members and fishers; the members' weights, [] where they have none."""
    if not isinstance(members, list) or not members:
        raise InputError(f"{path}: 'members' must be a list of files or of mappings")
    weights = []
    for number, member in enumerate(members):
        where = f"'members' entry {number}"
        member = {"model": member} if isinstance(member, str) else member
        if not isinstance(member, dict) or "model" not in member:
            raise InputError(f"{path}: {where} must be a file or have a key 'model'")
        for key, value in member.items():
            if key not in MEMBER_KEYS:
                known = ", ".join(MEMBER_KEYS)
                raise InputError(f"{path}: {where} has a key {key!r}; it may have {known}")
            if key != "weight" and not isinstance(value, str):
                raise InputError(f"{path}: {key!r} of {where} is {value!r}, not a file's name")
        recipe.members.append(path.parent / member["model"])
        if "fisher" in member:
            recipe.fishers.append(path.parent / member["fisher"])
        if "weight" in member:
            weights.append(_real(path, f"'weight' of {where}", member["weight"]))
    for what, found in (("fisher", recipe.fishers), ("weight", weights)):
        if found and len(found) != len(members):
            raise InputError(f"{path}: some of 'members' have a {what!r} and some have none")
    return weights


def _checked(path: Path, key: str, value: Any) -> Any:
    """A key's value as the recipe's field; what `merge` checks is left to it."""
    if key in ("base", "out", "data", "method"):
        if not isinstance(value, str):
            raise InputError(f"{path}: {key!r} is {value!r} where a word was expected")
        if key == "data":
            # A data set's name, unless there is such a file.
            return str(path.parent / value) if (path.parent / value).exists() else value
        return value if key == "method" else path.parent / value
    if key == "options":
        if not isinstance(value, Mapping):
            raise InputError(f"{path}: 'options' is {value!r} where a mapping was expected")
        return {name: _number_or_text(own) for name, own in value.items()}
    if key == "weights":
        if value == "search":
            return value
        if not isinstance(value, list):
            raise InputError(f"{path}: 'weights' is {value!r}, neither a list nor 'search'")
        return [_real(path, "'weights'", own) for own in value]
    if key == "normalize":
        return value
    if key == "floor":
        return _real(path, "'floor'", value)
    value = _number_or_text(value)
    least = {"limit": 1, "batch_size": 1, "steps": 0, "seed": None}[key]
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or (least is not None and value < least)
    ):
        bound = "" if least is None else f" of at least {least}"
        raise InputError(f"{path}: {key!r} is {value!r} where an integer{bound} was expected")
    return value


def _real(path: Path, what: str, value: Any) -> float:
    value = _number_or_text(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{path}: {what} is {value!r} where a number was expected")
    return float(value)
