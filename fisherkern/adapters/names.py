"""Names of tensors, with and without what wrappers put before them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

# DDP and DataParallel, torch.compile, PEFT, Lightning and RecTools, modules that hold one.
PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "torch_model.", "model.")
_ADAPTER = re.compile(r"(\.lora_\w+)\.default(?=\.|$)")


def bare_name(name: str) -> str:
    """Return a tensor's name without prefixes of wrappers and the name of PEFT's adapter."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
    return _ADAPTER.sub(r"\1", name)


def fit_names(names: Iterable[str], own: Iterable[str]) -> dict[str, str]:
    """Name -> the one of `own` that is the same, or the same but for wrappers' prefixes.

    Names that fit none, or that several fit, are left out.
    """
    names, exact = list(names), set(own)
    if exact.issuperset(names):
        return {name: name for name in names}
    counts = Counter(bare_name(name) for name in exact)
    bare = {bare_name(name): name for name in exact if counts[bare_name(name)] == 1}
    twice = Counter(bare_name(name) for name in names)
    return {
        name: bare[bare_name(name)]
        for name in names
        if twice[bare_name(name)] == 1 and bare_name(name) in bare
    }
