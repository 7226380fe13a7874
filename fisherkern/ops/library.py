"""Registration of the ops with `torch.library`: one argument list each, under `fisherkern::`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

P = ParamSpec("P")
T = TypeVar("T")

_LIBRARY = torch.library.Library("fisherkern", "DEF")
# What the dispatcher calls, by an op's name: for a tool that counts what an op is made of.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def _no_outputs(**_arguments: Any) -> None:
    """Return nothing, as an op does that only mutates."""


def register_op(
    outputs: Callable[..., Any] = _no_outputs,
    *,
    mutates: Sequence[str] = (),
    vmap_arg: str | None = None,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make an op `fisherkern::<name>` of a function of tensors and numbers.

    The function's annotations are the schema, its name without leading underscores is the op's,
    and its body, in plain PyTorch, serves every device.

    Args:
        outputs: Called with the op's arguments by name; gives empty tensors of the results'
            shapes and dtypes, for FakeTensor and torch.compile. Default: an op without results.
        mutates: Names of the arguments that the op writes to.
        vmap_arg: Where this argument and all outputs begin with the probes' dimension,
            torch.vmap over the argument is more probes of one call. Default: no torch.vmap.

    Returns:
        The decorator.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        name = function.__name__.lstrip("_")
        signature = inspect.signature(function)

        def fake(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return outputs(**bound.arguments)

        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fisherkern::{name}", fake, lib=_LIBRARY)
        op = getattr(torch.ops.fisherkern, name).default
        if vmap_arg is not None:
            rule = functools.partial(_as_probes, op, list(signature.parameters).index(vmap_arg))
            torch.library.register_vmap(f"fisherkern::{name}", rule, lib=_LIBRARY)
        IMPLEMENTATIONS[name] = function

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            result: T = op(*args, **kwargs)
            return result

        return call

    return decorate


def _as_probes(
    op: Any, index: int, _info: Any, in_dims: Sequence[int | None], *args: Any
) -> tuple[Any, Any]:
    """Return a rule of torch.library.register_vmap: outputs, and the mapped dimension of each."""
    mapped = [i for i, dim in enumerate(in_dims) if dim is not None]
    if mapped != [index]:
        name = op._schema.arguments[index].name
        raise NotImplementedError(f"{op._schema.name}: torch.vmap can be over {name} alone")
    delta: Tensor = args[index].movedim(in_dims[index], 0)
    result = op(*args[:index], delta.flatten(0, 1), *args[index + 1 :])
    apart = tree_map(lambda tensor: tensor.unflatten(0, delta.shape[:2]), result)
    return apart, tree_map(lambda _: 0, result)
