"""Registration of the ops with `torch.library`, one schema each under `fisherkern::`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("fisherkern", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `fisherkern::<schema>` and return its overload.

    `implementation` is plain PyTorch and serves every device; `fake` computes the
    outputs' shapes for FakeTensor and torch.compile.
    """
    name = _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fisherkern::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fisherkern, name).default


def no_outputs(*_args: Any, **_kwargs: Any) -> None:
    """The fake of an op that only mutates."""
