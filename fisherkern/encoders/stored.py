"""The encoder that a file describes, built without values once the description fits the file."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fisherkern.encoders.base import SequenceEncoder
from fisherkern.encoders.registry import ENCODERS
from fisherkern.errors import InputError, shown

# A history of a batch is no longer; every other size of an encoder is the axis of some tensor.
LONGEST = 1 << 16
# Arguments that say how many modules are built: each has a tensor at least.
COUNTS = ("layers", "window")
STORED_DTYPES = {int: "an integer", float: "a number", bool: "true or false", str: "a word"}


def stored_encoder(
    where: object,
    name: object,
    config: object,
    shapes: Mapping[str, Sequence[int]],
    known: Mapping[str, type[SequenceEncoder]] = ENCODERS,
) -> SequenceEncoder:
    """Build an encoder on the meta device, where nothing is drawn or allocated.

    The types and sizes of the configuration are held to the constructor and to the stored shapes
    before anything is built, so that a few bytes of a header cost no more than the file is large.

    Args:
        where: begins every message.
        name: the class's name, from the file.
        config: the constructor's arguments, from the file.
        shapes: of all the tensors in the file.
        known: the classes that the file may name.

    Raises:
        InputError: an unknown class, or a configuration that does not fit it or the tensors.
    """
    if not isinstance(name, str) or name not in known:
        raise InputError(f"{where}: unknown encoder {shown(name)}; known: {', '.join(known)}")
    if not isinstance(config, Mapping):
        raise InputError(f"{where}: its config does not fit {name}: it is {shown(config)}")
    limits = len(shapes), max((n for shape in shapes.values() for n in shape), default=0)
    problem = _problem(known[name], config, limits)
    if problem:
        raise InputError(f"{where}: its config does not fit {name}: {problem}")
    try:
        with torch.device("meta"):
            return known[name](**config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise InputError(f"{where}: its config does not fit {name}: {e}") from None


def _problem(
    kind: type[SequenceEncoder], config: Mapping[str, Any], limits: tuple[int, int]
) -> str | None:
    """Return why these are no arguments of an encoder whose tensors have at most these sizes."""
    parameters = inspect.signature(kind, eval_str=True).parameters
    for name, value in config.items():
        if name not in parameters:
            return f"{kind.__name__} has no {shown(name)}"
        if name == "items":  # the constructor checks them, and makes no more than they name
            continue
        inner = value if isinstance(value, list) else [value]
        for entry in inner:
            problem = _nested(entry, limits) if isinstance(entry, Mapping) else None
            if problem:
                return problem
        wanted = _scalars(parameters[name].annotation)
        if wanted and not _fits(value, wanted):
            words = " or ".join(text for kind, text in STORED_DTYPES.items() if kind in wanted)
            return f"{name} is {shown(value)} where {words} was expected"
        if type(value) is int:
            most = limits[0] if name in COUNTS else max(limits[1], LONGEST)
            if not 0 <= value <= most:
                return f"{name} is {shown(value)}, which no tensor of the file has"
    return None


def _nested(config: Mapping[str, Any], limits: tuple[int, int]) -> str | None:
    name = config.get("class")
    if not isinstance(name, str) or name not in ENCODERS:
        return f"the unknown class {shown(name)}"
    return _problem(ENCODERS[name], {k: v for k, v in config.items() if k != "class"}, limits)


def _scalars(annotation: Any) -> set[type]:
    """Return the plain types of an annotation; none where it has others."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    kinds = set(typing.get_args(annotation)) if union else {annotation}
    return kinds if kinds <= {*STORED_DTYPES, type(None)} else set()


def _fits(value: Any, wanted: set[type]) -> bool:
    return type(value) in wanted or (type(value) is int and float in wanted)
