"""Random views of sequences (CL4SRec, section 3.3), a whole batch at a time, in new tensors.

Rows are left-padded with 0 and hold n items side by side. A row of one item stays as it is,
and so does one too short for the floor of its share to reach one item; cropping keeps at
least one. Draws come from a CPU generator.
"""

from __future__ import annotations

import torch
from torch import Tensor


def crop(tokens: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """floor(ratio n) consecutive items of each row, the first drawn uniformly; (N, T)."""
    lengths = _lengths(tokens)
    kept = _share(lengths, ratio).clamp(min=1).minimum(lengths)
    skipped = _below(lengths - kept + 1, generator)  # items cut off on the right
    column = torch.arange(tokens.shape[1], device=tokens.device)
    source = (column - skipped[:, None]).clamp(min=0)
    inside = column >= tokens.shape[1] - kept[:, None]
    return tokens.gather(1, source).masked_fill(~inside, 0)


def mask(
    tokens: Tensor, ratio: float, generator: torch.Generator, mask_token: int | None
) -> Tensor:
    """`tokens` (N, T) with floor(ratio n) items of each row, drawn uniformly, hidden.

    They become `mask_token`; with None padding, and then never the newest item, because
    a history must end in an item.
    """
    lengths = _lengths(tokens)
    counts = _share(lengths, ratio)
    keys = torch.rand(tokens.shape, generator=generator).to(tokens.device)
    keys = keys.masked_fill(tokens == 0, -1.0)
    if mask_token is None:
        keys[:, -1] = -1.0
        counts = counts.minimum((lengths - 1).clamp(min=0))
    order = keys.argsort(dim=1, descending=True)
    first = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
    hidden = torch.zeros_like(first).scatter(1, order, first) & (lengths > 1)[:, None]
    return tokens.masked_fill(hidden, 0 if mask_token is None else mask_token)


def reorder(tokens: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """`tokens` (N, T) with floor(ratio n) consecutive items of each row in random order."""
    lengths = _lengths(tokens)
    counts = _share(lengths, ratio)
    end = tokens.shape[1] - _below(lengths - counts + 1, generator)[:, None]
    start = end - counts[:, None]
    column = torch.arange(tokens.shape[1], device=tokens.device)
    # Inside the stretch the keys lie anywhere in it; outside they keep every item in its place.
    keys = torch.rand(tokens.shape, generator=generator, dtype=torch.float64).to(tokens.device)
    inside = (column >= start) & (column < end)
    keys = torch.where(inside, start + counts[:, None] * keys, column.double())
    return tokens.gather(1, keys.argsort(dim=1, stable=True))


def two_views(
    tokens: Tensor,
    crop_ratio: float,
    mask_ratio: float,
    reorder_ratio: float,
    generator: torch.Generator,
    mask_token: int | None,
) -> tuple[Tensor, Tensor]:
    """Two views (N, T) of each row, made by two different ones of the three operations.

    The ordered pair of operations is drawn uniformly for every row.
    """
    made = torch.stack(
        [
            crop(tokens, crop_ratio, generator),
            mask(tokens, mask_ratio, generator, mask_token),
            reorder(tokens, reorder_ratio, generator),
        ]
    )
    first = torch.randint(3, (len(tokens),), generator=generator)
    second = (first + torch.randint(1, 3, (len(tokens),), generator=generator)) % 3
    row = torch.arange(len(tokens), device=tokens.device)
    return made[first.to(tokens.device), row], made[second.to(tokens.device), row]


def _lengths(tokens: Tensor) -> Tensor:
    return (tokens != 0).sum(dim=1)


def _share(lengths: Tensor, ratio: float) -> Tensor:
    # In float64, as Python computes it: 0.6 of 5 items must be 3.
    return (lengths.double() * ratio).floor().long()


def _below(bounds: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform integers in 0..bounds-1, (N,); bounds of at least 1."""
    draws = torch.rand(bounds.shape, generator=generator, dtype=torch.float64)
    return (draws.to(bounds.device) * bounds).long().minimum(bounds - 1)
