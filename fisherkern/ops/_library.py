"""Registration of the ops with `torch.library`, one schema each under `fisherkern::`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

_LIBRARY = torch.library.Library("fisherkern", "DEF")
# What the dispatcher calls, by an op's name: for a tool that counts what an op is made of.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    probes_of: int | None = None,
) -> Any:
    """Define `fisherkern::<schema>` and return its overload.

    `implementation` is plain PyTorch and serves every device; `fake` computes the
    outputs' shapes for FakeTensor and torch.compile. Where argument `probes_of` and all outputs
    begin with the probes' dimension, torch.vmap over that argument is more probes of one call.
    """
    name = _LIBRARY.define(schema)
    IMPLEMENTATIONS[name] = implementation
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fisherkern::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fisherkern, name).default
    if probes_of is not None:
        rule = functools.partial(_as_probes, op, probes_of)
        torch.library.register_vmap(f"fisherkern::{name}", rule, lib=_LIBRARY)
    return op


def _as_probes(
    op: Any, index: int, _info: Any, in_dims: Sequence[int | None], *args: Any
) -> tuple[Any, Any]:
    """A rule of torch.library.register_vmap: outputs, and which dimension of each is the mapped."""
    mapped = [i for i, dim in enumerate(in_dims) if dim is not None]
    if mapped != [index]:
        name = op._schema.arguments[index].name
        raise NotImplementedError(f"{op._schema.name}: torch.vmap can be over {name} alone")
    delta = args[index].movedim(in_dims[index], 0)
    found = op(*args[:index], delta.flatten(0, 1), *args[index + 1 :])
    apart = tree_map(lambda tensor: tensor.unflatten(0, delta.shape[:2]), found)
    return apart, tree_map(lambda _: 0, found)


def no_outputs(*_args: Any, **_kwargs: Any) -> None:
    """The fake of an op that only mutates."""
