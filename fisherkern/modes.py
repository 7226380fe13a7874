"""Evaluation mode for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def eval_mode(model: Any, *, gradients: bool = False) -> Iterator[None]:
    """Put every submodule into eval mode inside the block, and back into its own mode after it.

    Args:
        model: A module. Anything else that can be called has no mode and is left alone.
        gradients: The block differentiates the model. Recurrent layers then run without cuDNN,
            which has no backward pass in eval mode.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    recurrent = gradients and any(isinstance(module, nn.RNNBase) for module in modules)
    library = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    if modules:
        model.eval()
    try:
        with library:
            yield
    finally:
        for module, training in modes:
            module.training = training
