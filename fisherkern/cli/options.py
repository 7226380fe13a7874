"""Flags made from a dataclass or a signature, and arguments read from a JSON file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fisherkern.errors import InputError
from fisherkern.files import read_json

# Switches that are off by default, and have no flag that says so.
OFF = ("compile", "quiet")


def add_flag(
    parser: argparse._ActionsContainer,
    name: str,
    annotation: str,
    default: Any,
    choices: Sequence[str] | None = None,
) -> None:
    """--name for an argument annotated as source text says: "int", "float | None", "bool", ..."""
    flag = "--" + name.replace("_", "-")
    kinds = annotation.split(" | ")
    if annotation == "bool":
        switch = argparse.BooleanOptionalAction
        parser.add_argument(flag, action=switch, default=default)
    elif kinds[0] == "bool":
        parser.add_argument(flag, nargs="?", const=True, default=default, metavar="str")
    elif annotation.startswith("tuple"):
        size = len(default)
        parser.add_argument(flag, type=float, nargs=size, default=default, metavar="float")
    else:
        kind = {"int": int, "float": float, "str": str}[kinds[0]]
        metavar = None if choices else kinds[0]
        kind = _or_none(kind) if "None" in kinds and default is not None else kind
        parser.add_argument(flag, type=kind, default=default, choices=choices, metavar=metavar)


def _or_none(kind: type) -> Any:
    """`kind`, or None for the word "none": how to switch off what is on by default."""

    def read(text: str) -> Any:
        return None if text == "none" else kind(text)

    read.__name__ = kind.__name__  # for argparse's message
    return read


def flags_from(path: Path, options: argparse.Namespace) -> list[str]:
    """The flags that a JSON object of arguments stands for, to be parsed before those given.

    `options` are the arguments without them: a null or false that is so anyway needs no flag.

    A result.json is read as the arguments it holds, so that what it tells can be run again.
    Raises InputError if the file is no such thing.
    """
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("arguments"), dict):
        content = content["arguments"]
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object of arguments by name")
    flags = []
    for name, value in content.items():
        flag = "--" + name.replace("_", "-")
        if name in ("command", "config") or value is None and getattr(options, name, 0) is None:
            continue
        if value is True:
            flags.append(flag)
        elif value is False:
            flags += [] if name in OFF else [flag.replace("--", "--no-", 1)]
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif value is None:
            flags.append(f"{flag}=none")
        else:
            text = json.dumps(value) if isinstance(value, Mapping) else str(value)
            flags.append(f"{flag}={text}")
    return flags
