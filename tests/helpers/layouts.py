"""Tensors that lie in memory in different ways."""

from __future__ import annotations

import torch
from torch import Tensor


def layouts(shape: tuple[int, ...]) -> list[Tensor]:
    """Random values: contiguous, transposed, with gaps, expanded."""
    g = torch.Generator().manual_seed(0)
    turned = (*shape[:-2], shape[-1], shape[-2])
    return [
        torch.randn(shape, generator=g),
        torch.randn(turned, generator=g).transpose(-1, -2),
        torch.randn(*shape[:-1], 2 * shape[-1], generator=g)[..., ::2],
        torch.randn(shape[-1], generator=g).expand(shape),
    ]
