"""A merge written down: what `fisherkern merge` does, from flags or from a YAML file."""

from __future__ import annotations

import os
import re
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from fisherkern.cli.mergekit import from_mergekit, is_mergekit
from fisherkern.cli.yaml_documents import LinedMapping, parse_yaml, read_yaml
from fisherkern.errors import InputError, shown

Words = Literal["search", "linear-decay", "cosine-decay", "1-sqrt-decay"]
WORDS_FOR_WEIGHTS = typing.get_args(Words)


@dataclass
class Recipe:
    """The members and everything that `fisherkern merge` hands to `merge`.

    Its fields are the keys of a recipe, except that `fishers` stand beside the members there, and
    `dtype`, which the members must have, is in mergekit's recipes alone.
    """

    members: list[Path]
    fishers: list[Path] = field(default_factory=list)
    base: Path | None = None
    method: str | None = None
    weights: list[float] | Words | None = None
    options: dict[str, Any] = field(default_factory=dict)
    floor: float = 0.1
    normalize: str | None = "mean"
    check_fingerprint: bool = True
    steps: Annotated[int, msgspec.Meta(ge=0)] | None = None
    seed: int = 0
    data: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=1)] = 512
    batch_size: Annotated[int, msgspec.Meta(ge=1)] = 128
    out: Path | None = None
    dtype: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what is merged and how, after the flags beside a recipe, as JSON values."""
        return {name: _told(getattr(self, name)) for name in RECIPE_FIELDS}

    def settings(self) -> dict[str, Any]:
        """Return the arguments that `merge` and `merge_files` take alike."""
        names = ("method", "floor", "normalize", "check_fingerprint", "seed")
        return {"options": self.options or None, **{name: getattr(self, name) for name in names}}


@dataclass
class _Member:
    model: Path
    fisher: Path | None = None
    weight: float | None = None


def _told(value: Any) -> Any:
    if isinstance(value, list):
        return [_told(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


RECIPE_FIELDS = tuple(own.name for own in fields(Recipe))
_WEIGHT_WORDS = ", ".join(WORDS_FOR_WEIGHTS)
_RECIPE_KEYS = tuple(name for name in RECIPE_FIELDS if name not in ("fishers", "dtype"))
MEMBER_KEYS = tuple(own.name for own in fields(_Member))


def weights_from(text: str | None) -> list[float] | Words | None:
    """Return the weights that --weights gives."""
    if text is None or text in WORDS_FOR_WEIGHTS:
        return text  # type: ignore[return-value]  # mypy narrows no str to a Literal
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        wrong = f"--weights: {shown(text)} is neither numbers nor one of {_WEIGHT_WORDS}"
        raise InputError(wrong) from None


def option_from(text: str) -> tuple[str, Any]:
    """Return the name and the value that --option gives, the value as a recipe would read it."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"--option: {shown(text)} is not like density=0.2")
    return name, parse_yaml(f"--option: {shown(name)}", value)


def from_file(path: Path) -> Recipe:
    """Return the recipe in a YAML file; paths in it are relative to its folder.

        members:                    # files, or mappings of model, fisher and weight
          - {model: m1.safetensors, fisher: m1.fisher.safetensors}
          - {model: m2.safetensors, fisher: m2.fisher.safetensors}
        method: fisher
        options: {group: row}
        weights: search
        data: ml-1m
        out: merged

    A recipe of mergekit is read too, see `fisherkern.cli.mergekit`.

    Raises InputError, naming the file, the line, the key and the value, for anything else.
    """
    content = _read(path)
    if is_mergekit(content):
        return Recipe(**from_mergekit(path, content))
    _check_keys(content, _RECIPE_KEYS, str(path), "there is no key {}; it may have {}")
    if "members" not in content:
        raise InputError(f"{path}: it has no key 'members', the list of models to merge")
    members = _members(path, content.pop("members"))
    lists = {key: [getattr(own, key) for own in members] for key in ("fisher", "weight")}
    for key, values in lists.items():
        if len({value is None for value in values}) == 2:
            raise InputError(f"{path}: some of 'members' have a '{key}' and some have none")
    given = {key: _converted(path, content, key, Recipe) for key in content}
    if lists["weight"][0] is not None:
        if "weights" in given:
            raise InputError(f"{path}: 'weights' and the members' 'weight' say the same; keep one")
        given["weights"] = lists["weight"]
    if lists["fisher"][0] is not None:
        given["fishers"] = lists["fisher"]
    if given.get("data") is not None:
        beside = path.parent / given["data"]
        if os.path.exists(beside):  # noqa: PTH110  # Path's raises for a name of 300 characters
            given["data"] = str(beside)  # else a data set's name
    return Recipe([own.model for own in members], **given)


def _read(path: Path) -> LinedMapping:
    content = read_yaml(path)
    if not isinstance(content, LinedMapping):
        raise InputError(f"{path}: must hold a mapping with the keys {', '.join(_RECIPE_KEYS)}")
    return content


def _check_keys(mapping: LinedMapping, known: tuple[str, ...], path: str, sentence: str) -> None:
    for key, line in mapping.lines.items():
        if key not in known:
            raise InputError(f"{path}:{line}: {sentence.format(shown(key), ', '.join(known))}")


def _members(path: Path, content: Any) -> list[_Member]:
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: 'members' must be a list of files or of mappings")
    members = []
    for number, entry in enumerate(content):
        where = f"'members' entry {number}"
        if isinstance(entry, str):
            members.append(_Member(path.parent / entry))
            continue
        if not isinstance(entry, LinedMapping) or "model" not in entry:
            raise InputError(
                f"{path}: {where} must be a file or have a key 'model', is {shown(entry)}"
            )
        _check_keys(entry, MEMBER_KEYS, str(path), where + " has a key {}; it may have {}")
        given = {key: _converted(path, entry, key, _Member, f" of {where}") for key in entry}
        members.append(_Member(**given))
    return members


def _converted(path: Path, mapping: LinedMapping, key: str, kind: type, where: str = "") -> Any:
    """Return a key's value as the type of the field: strictly, so that true is no number."""

    def path_from(wanted: type, value: Any) -> Any:
        if wanted is Path and isinstance(value, str):
            return path.parent / value
        raise msgspec.ValidationError("Expected `str`")

    value, hint = mapping[key], typing.get_type_hints(kind, include_extras=True)[key]
    try:
        return msgspec.convert(value, hint, dec_hook=path_from)
    except msgspec.ValidationError as error:
        what = f"{path}:{mapping.lines[key]}: {shown(key)}{where} is {shown(value)}"
        raise InputError(f"{what} where {_wanted(str(error))} was expected") from None


WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a word",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
}


def _wanted(message: str) -> str:
    """In English what msgspec says that it expected."""
    match = re.match(r"Expected `([^`]*)`(?: >= (\d+))?", message)
    if match is None:  # the one word that is neither a list nor a number
        return f"a list of numbers or one of {_WEIGHT_WORDS}"
    words = " or ".join(WORDS[kind] for kind in match[1].split(" | ") if kind in WORDS)
    return words + (f" of at least {match[2]}" if match[2] else "")
