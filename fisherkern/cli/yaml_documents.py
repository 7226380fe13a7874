"""YAML as recipes and settings are written in it, read within limits.

Apart from the other documents, because only the command line needs a YAML parser.
"""

from __future__ import annotations

import os
import re
from typing import Any

import yaml

from fisherkern.documents import MAX_DEPTH, check_tree, read_bytes
from fisherkern.errors import InputError, shown

MAX_ALIASES = 16  # each may double what a reader of the values sees
MAX_YAML = 1 << 16  # bytes: PyYAML reads 20 kB in a second


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read a YAML file of plain values; its mappings are `LinedMapping`."""
    return parse_yaml(path, read_bytes(path, MAX_YAML))


class LinedMapping(dict[str, Any]):
    """A mapping of a YAML text that knows the line of each key."""

    lines: dict[str, int]


class PlainLoader(yaml.SafeLoader):
    """YAML of plain values, in which no key may stand twice and 1e-3 is a number."""

    aliases = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node as PyYAML does, with few aliases and no types but the plain ones."""
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                line = self.peek_event().start_mark.line + 1
                raise InputError(f":{line}: more than {MAX_ALIASES} aliases")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            line = self.peek_event().start_mark.line + 1
            raise InputError(f":{line}: nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node.tag not in _PLAIN_TAGS:
            line = node.start_mark.line + 1
            raise InputError(f":{line}: a value of the type {shown(node.tag)} is not read")
        return node


def _mapping(loader: PlainLoader, node: yaml.MappingNode) -> LinedMapping:
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise InputError(f":{line}: the key {shown(key)} is not a word")
        if key in lines:
            raise InputError(f":{line}: the key {shown(key)} stands here twice")
        lines[key] = line
    mapping = LinedMapping(loader.construct_mapping(node, deep=True))
    mapping.lines = lines
    return mapping


_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")
}
PlainLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# Dates are words here, and a key "<<" is one too.
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(where: object, content: str | bytes) -> Any:
    """Return the plain values of a YAML text; `where` begins every message.

    Raises:
        InputError: no UTF-8, no YAML, or something beyond the limits of this module.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = yaml.load(text, Loader=PlainLoader)
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{where}: could not be read: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}{line}: not valid YAML: {reason}") from None
    except RecursionError:
        raise InputError(f"{where}: not valid YAML: nested too deep") from None
    except (ValueError, LookupError) as error:  # what an explicit type makes of another's text
        raise InputError(f"{where}: not valid YAML: {error}") from None
    check_tree(where, value)
    return value
