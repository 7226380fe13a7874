"""The one exception type that means "the input is wrong", and how it quotes what was wrong."""

from __future__ import annotations

from collections.abc import Mapping, Set
from numbers import Number
from pathlib import PurePath
from typing import Any

MAX_SHOWN = 80  # characters of a quoted value
MAX_MESSAGE = 1000
_ENTRIES, _DEPTH = 4, 3  # of a container that are quoted


class InputError(ValueError):
    """Bad input: a file, a line, a tensor or an argument of the user's.

    The message is one sentence that names what is wrong and where, on one line whatever it
    quotes. The command line prints it alone and exits with status 2; anything else is a bug of
    ours.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


def one_line(text: str, most: int = MAX_MESSAGE) -> str:
    """Return `text` on one line that any terminal prints: the rest escaped, the middle cut."""
    if len(text) > most:
        text = f"{text[: most - 205]} ... {text[-200:]}"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def shown(value: Any) -> str:
    """Quote a value of the user's for a message: on one line, at most `MAX_SHOWN` characters.

    What the value holds is looked at as far as it is shown, so one of any size costs nothing.
    """
    text = _quoted(value, _DEPTH)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _quoted(value: Any, depth: int) -> str:
    if isinstance(value, str | bytes | bytearray):
        return repr(value[: MAX_SHOWN + 1])
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {int(value.bit_length() * 0.30103) + 1} digits"
    if isinstance(value, list | tuple | Mapping | Set):
        return _entries(value, depth)
    if isinstance(value, PurePath):
        return repr(str(value)[: MAX_SHOWN + 1])
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return _quoted(value.item(), depth)
    simple = value is None or isinstance(value, bool | Number)
    if simple or type(value).__module__.partition(".")[0] in ("numpy", "torch"):
        return one_line(repr(value), MAX_MESSAGE) if _small(value) else _kind(value)
    return f"class {value.__name__}" if isinstance(value, type) else _kind(value)


def _small(value: Any) -> bool:
    """Whether the representation of a number or of an object of NumPy's or PyTorch's is short."""
    size = value.numel() if hasattr(value, "numel") else getattr(value, "size", 1)
    return not hasattr(value, "named_modules") and (not isinstance(size, int) or size <= _ENTRIES)


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _entries(value: Any, depth: int) -> str:
    if isinstance(value, list | tuple):
        left, right = ("[", "]") if isinstance(value, list) else ("(", ")")
    else:
        left, right = "{", "}"
    if not depth:
        return f"{left}...{right}" if len(value) else left + right
    parts = []
    for number, entry in enumerate(value):
        if number == _ENTRIES:
            parts.append("...")
            break
        text = _quoted(entry, depth - 1)
        parts.append(
            f"{text}: {_quoted(value[entry], depth - 1)}"
            if left == "{" and isinstance(value, Mapping)
            else text
        )
    comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
    return f"{left}{', '.join(parts)}{comma}{right}"
