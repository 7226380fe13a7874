"""Commands made from public functions: signatures give the flags, docstrings the help.

cyclopts reads the signature that `command` puts together, so a new argument of a public
function is a flag, a key of --config and a line of --help without a word said here.
"""

from __future__ import annotations

import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import docstring_parser
from cyclopts import Group, Parameter
from docstring_parser import DocstringStyle

from fisherkern.data import load

FILES, OPTIONS, DATA, GENERAL = (
    Group(name, sort_key=place)
    for place, name in enumerate(("Files", "Options", "Data", "General"))
)
_SCALARS = (bool, int, float, str, Path)
NO_FLAGS = ("run", "progress")  # what a command's function is given, and what --quiet says


def _general(
    data: str | None = None,
    out: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    quiet: bool = False,
    config: Path | None = None,
) -> None:
    """Take the arguments that every command takes.

    Args:
        data: ml-1m, beauty, synthetic, or a file.
        out: folder for the results (default: a folder of runs/).
        seed: of everything that is drawn.
        device: cpu, cuda or cuda:1.
        threads: CPU threads.
        quiet: show no progress.
        config: JSON file of arguments by name, such as a result.json; flags override it.
    """


@dataclass(frozen=True)
class Command:
    """A command: its name, the function that does it, and the signature that users see."""

    name: str
    run: Callable[..., None]
    signature: inspect.Signature
    data_arguments: tuple[str, ...]  # those that go to `load`, which others' names go before

    def stub(self) -> Callable[..., None]:
        """Return what cyclopts is given: the signature and the help of the command, to be read."""

        def stub(*arguments: Any, **options: Any) -> None: ...

        stub.__name__, stub.__doc__ = self.name, summary(self.run)
        stub.__signature__ = self.signature  # type: ignore[attr-defined]
        stub.__annotations__ = {n: p.annotation for n, p in self.signature.parameters.items()}
        stub.command = self  # type: ignore[attr-defined]
        return stub


def command(
    name: str,
    *sources: Callable[..., Any],
    without: Collection[str] = (),
    choices: Mapping[str, Iterable[str]] | None = None,
    more: Mapping[str, Mapping[str, inspect.Parameter]] | None = None,
) -> Callable[[Callable[..., None]], Command]:
    """Make a command of the decorated function.

    Args:
        name: of the command.
        sources: public functions (or dataclasses) all of whose arguments become flags, where a
            command line can give them: numbers, words, switches, files and lists of those.
        without: arguments of theirs that the command fills in itself.
        choices: argument -> the words that it may be.
        more: title -> arguments by name, a group of the help each.

    The function is called with a `Run` as `run` and its other arguments by name. Its own
    arguments go before those of the same name in a source, and its docstring's before theirs.
    """

    def make(function: Callable[..., Any]) -> Command:
        found: dict[str, inspect.Parameter] = {}
        of_data: list[str] = []
        groups: list[tuple[Group, Callable[..., Any]]] = [(OPTIONS, function)]
        groups += [*((OPTIONS, source) for source in sources), (DATA, load), (GENERAL, _general)]
        for group, source in groups:
            own = source is function
            skipped = {*NO_FLAGS, *(() if own else without)}
            skipped |= {"name_or_path", "name"} if source is load else set()
            parameters = _parameters(source)
            help_of: dict[str, str] = {}
            for described in (_general, *sources, source, function):
                help_of |= argument_help(described)
            for parameter in parameters:
                if parameter.name in found or parameter.name in skipped:
                    continue
                flag = _flag(parameter, group, help_of, choices or {}, positional=own)
                if flag is not None:
                    found[parameter.name] = flag
                    of_data += [parameter.name] if source is load else []
        for place, (title, extra) in enumerate((more or {}).items()):
            group = Group(title, sort_key=10 + place)
            for own_name, parameter in extra.items():
                flag = _flag(parameter, group, {}, choices or {})
                if flag is not None and own_name not in found:
                    found[own_name] = flag
        ordered = sorted(found.values(), key=lambda parameter: parameter.kind)
        return Command(name, function, inspect.Signature(ordered), tuple(of_data))

    return make


def _parameters(source: Callable[..., Any]) -> list[inspect.Parameter]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(source, eval_str=True).parameters.values()
    return [parameter for parameter in parameters if parameter.kind in named]


def _flag(
    parameter: inspect.Parameter,
    group: Group,
    help_of: Mapping[str, str],
    choices: Mapping[str, Iterable[str]],
    *,
    positional: bool = False,
) -> inspect.Parameter | None:
    """Return the parameter as cyclopts is to see it; None where no command line can give it."""
    kind = flag_type(parameter.annotation)
    if parameter.name in choices:
        words = Literal[tuple(choices[parameter.name])]  # type: ignore[valid-type]
        kind = words if parameter.default is not None else words | None
    if kind is None:
        return None
    positional = positional and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    text = help_of.get(parameter.name, "")
    default = parameter.default
    shown = default is not None and default != () and not isinstance(default, bool)
    about = Parameter(
        help=re.sub(r" Default: \S+\.$", "", text),  # shown beside it anyway
        group=FILES if positional else group,
        show_default=None if shown else False,
    )
    where = parameter.kind if positional else inspect.Parameter.KEYWORD_ONLY
    return parameter.replace(annotation=Annotated[kind, about], kind=where)


def flag_type(annotation: Any) -> Any:
    """Return what a command line can give of a type: a list for `Sequence[float] | Tensor`.

    None where it can give nothing.
    """
    if annotation in _SCALARS:
        return annotation
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, Union):
        kinds = [kind for kind in map(flag_type, inner) if kind is not None]
        lists = [kind for kind in kinds if typing.get_origin(kind) is list]
        if Path in kinds:  # str | os.PathLike[str]
            kinds = [kind for kind in kinds if kind is not str]
        elif lists:  # int | Sequence[int]: a list of one
            kinds = lists
        kinds.sort(key=lambda kind: kind is str)  # a word is what reads as nothing else
        if type(None) in inner and kinds:
            kinds.append(type(None))
        return Union[tuple(kinds)] if kinds else None  # noqa: UP007
    if annotation is os.PathLike or origin is os.PathLike:
        return Path
    if origin is Literal:
        return annotation
    if origin is tuple and all(kind in _SCALARS for kind in inner):
        return annotation
    if origin in (list, Sequence) and inner[0] in _SCALARS:
        return list[inner[0]]  # type: ignore[valid-type]
    return None


def summary(source: Callable[..., Any]) -> str:
    """Return the docstring's first paragraph."""
    return " ".join((inspect.getdoc(source) or "").split("\n\n")[0].split())


def argument_help(source: Callable[..., Any]) -> dict[str, str]:
    """Argument -> what the docstring's "Args:" say of it."""
    parsed = docstring_parser.parse(inspect.getdoc(source) or "", DocstringStyle.GOOGLE)
    return {own.arg_name: " ".join((own.description or "").split()) for own in parsed.params}
