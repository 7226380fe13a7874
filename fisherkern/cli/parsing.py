"""The command line and the --config file read into a `Run`, by cyclopts."""

from __future__ import annotations

import inspect
import json
import re
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cyclopts import App, CoercionError, CycloptsError, Parameter, UnusedCliTokensError
from cyclopts.config import Dict
from rich.console import Console

from fisherkern import __version__
from fisherkern.cli.arguments import Command
from fisherkern.cli.run import Run
from fisherkern.errors import InputError
from fisherkern.files import read_json

# Lists take the words up to the next flag; of a flag given twice the last value counts.
REPEATABLE: dict[str, Any] = {
    "negative_iterable": (),
    "consume_multiple": True,
    "allow_repeating": True,
}


def make_app(commands: Iterable[Command]) -> App:
    """Return the application of all commands; help is drawn on a terminal and plain elsewhere."""
    terminal = sys.stdout.isatty()
    app = App(
        name="fisherkern",
        help="Diagonal Fisher and Fisher-weighted merging of next-item recommenders.",
        version=__version__,
        config=[_read_config, _check_values],
        default_parameter=Parameter(**REPEATABLE),
        console=Console(width=None if terminal else 100),
        help_format="plaintext",
        help_formatter="default" if terminal else "plain",
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    for place, command in enumerate(commands):
        app.command(command.stub(), name=command.name, sort_key=place)
    return app


def parse(app: App, words: Sequence[str]) -> tuple[Command, Run] | None:
    """Return the command and its run; None where help or the version was asked for, and printed.

    Raises InputError, one line, for what cyclopts refuses.
    """
    if not words:
        known = ", ".join(name for name in app if not name.startswith("-"))
        raise InputError(f"name a command: {known}; --help says what they do")
    try:
        function, bound, *_ = app.parse_args(list(words))
    except CycloptsError as error:
        raise InputError(_one_line(error)) from None
    command = getattr(function, "command", None)
    if command is None:
        function(*bound.args, **bound.kwargs)
        return None
    given = dict(bound.arguments)
    parameters = command.signature.parameters
    values = {name: given.get(name, parameter.default) for name, parameter in parameters.items()}
    return command, Run(command.name, values, command.data_arguments, frozenset(given))


def _one_line(error: CycloptsError) -> str:
    if isinstance(error, UnusedCliTokensError):
        text = f"unexpected words: {' '.join(error.unused_tokens or ())}"
    else:
        text = re.sub(r'^Command "[^"]*" parameter ', "", " ".join(str(error).split()))
        text = text.partition(" Available commands:")[0].rstrip(".")
    name = None if error.argument is None else error.argument.name
    if name and not {name, name.strip("-").replace("-", "_")}.intersection(
        re.split(r"[^\w-]+", text)
    ):
        text = f"{name}: {text}"
    return f"{text} (--help lists the options)"


def _read_config(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Give the arguments without flags the values of --config, a JSON object by name.

    A result.json is read as the arguments it holds, so that what it tells can be run again.
    """
    named = {argument.name: argument for argument in arguments}
    if "--config" not in named or not named["--config"].tokens:
        return
    path = named["--config"].tokens[-1].value
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("arguments"), dict):
        content = content["arguments"]
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object of arguments by name")
    values = {}
    for name, value in content.items():
        argument = named.get("--" + name.replace("_", "-"))
        default = None if argument is None else argument.field_info.default
        # Stands for "not given" where that is the default, which no flag can say.
        if name in ("command", "config") or (
            value in (None, []) and argument and not _set(default)
        ):
            continue
        values[name] = json.dumps(value) if isinstance(value, Mapping) else value
    Dict({commands[-1]: values}, source=str(path))(app, commands, arguments)


def _set(default: Any) -> bool:
    return default is not None and default is not inspect.Parameter.empty and default != ()


def _check_values(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Refuse what cyclopts would take: 1.5 for a whole number, "none" for a word."""
    for argument in arguments:
        kinds = _scalars(argument.hint)
        whole = int in kinds and float not in kinds
        for place, token in enumerate(argument.tokens):
            none = type(None) in kinds and token.value.lower() in ("none", "null")
            if none and str in kinds and _set(argument.field_info.default):
                argument.tokens[place] = token.evolve(implicit_value=None)
            elif whole and not none and _no_integer(token.value, words=str in kinds):
                raise CoercionError(argument=argument, token=token, target_type=int)


def _no_integer(text: str, *, words: bool) -> bool:
    """Whether `text` is no whole number; where words may be given too, another number."""
    if re.fullmatch(r"[+-]?\d+", text):
        return False
    return not words or bool(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text))


def _scalars(hint: Any) -> set[Any]:
    inner = typing.get_args(hint)
    return set().union(*map(_scalars, inner)) if inner else {hint}
