"""Draws without replacement from a sharded table, the same for any number of shards.

As `ops.sample_distinct`: the largest perturbed value of every range of items, then in the few
ranges with the largest ones the items. A range that two processes share has one mass and one
largest value, that of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherkern.ops import counter_rng
from fisherkern.ops.sample_distinct import given_maximum, range_maxima, unbiased_weights
from fisherkern.ops.sample_items import range_logits, row_blocks
from fisherkern.ops.softmax_lse import RANGE, num_ranges
from fisherkern.processes import joined_sum, stacked

ShardedItems = Any  # a ShardedItemTable, whose file imports this one


def every_item(table: ShardedItems, h: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """All V items of each row and their probabilities, (N, V) each."""
    p = lse.new_zeros(len(h), table.num_items)
    for tile in table.tiles(h):
        p[:, tile.first : tile.first + tile.z.shape[1]] = (tile.z - lse[:, None]).exp()
    return torch.arange(table.num_items, device=h.device).expand(len(h), -1), joined_sum(p)


def distinct_items(
    table: ShardedItems,
    h: Tensor,
    lse: Tensor,
    ranges: Tensor,
    rows: Tensor,
    k: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """(ids (N, k), ω (N, k)) for k < V; `ranges` (N, r): log-sum-exps of this process's."""
    maximum, parts = _largest_ranges(table, ranges - lse[:, None].double(), rows, k + 1, seed)
    log_p = _log_p(table, h, lse, parts)
    items = parts[:, :, None] * RANGE + torch.arange(RANGE, device=h.device)
    own = (items >= table.first) & (items < table.first + len(table.weight))
    values = torch.empty_like(log_p)
    for few in row_blocks(len(rows), 16 * items[:1].numel()):
        noise = counter_rng.gumbel_at(seed, rows[few, None, None], items[few])
        values[few] = log_p[few] + noise
    highest = stacked(values.amax(dim=2)).amax(dim=0)
    for few in row_blocks(len(rows), 16 * items[:1].numel()):
        values[few] = given_maximum(values[few], highest[few], maximum[few])
    # Where fewer than k items are possible, impossible ones of the catalogue fill up.
    values = values.clamp_(min=torch.finfo(values.dtype).min)
    values = values.masked_fill_(~own, -torch.inf).flatten(1)
    best, place = torch.topk(values, min(k + 1, values.shape[1]), dim=1)
    kept = best, log_p.flatten(1).gather(1, place), items.flatten(1).gather(1, place)
    best, log_p, ids = (stacked(part).transpose(0, 1).flatten(1) for part in kept)
    best, place = torch.topk(best, k + 1, dim=1)
    log_p, ids = log_p.gather(1, place[:, :k]), ids.gather(1, place[:, :k])
    return ids, unbiased_weights(log_p, best[:, k:]).to(lse.dtype)


def _largest_ranges(
    table: ShardedItems, log_mass: Tensor, rows: Tensor, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the `count` ranges of the whole table with the largest maxima, and their numbers."""
    first = table.first // RANGE
    parts = torch.arange(first, first + log_mass.shape[1], device=rows.device)
    maxima, number = _outermost(log_mass, parts)
    maxima = range_maxima(maxima, number, rows, seed)
    inside = range_maxima(log_mass[:, 1:-1], parts[1:-1], rows, seed)
    inside, place = torch.topk(inside, min(count, inside.shape[1]), dim=1)
    # As many from every process: what is missing is never chosen.
    missing = count - inside.shape[1]
    inside = torch.nn.functional.pad(inside, (0, missing), value=-torch.inf)
    place = torch.nn.functional.pad(place + first + 1, (0, missing), value=-1)
    inside, place = (stacked(part).transpose(0, 1).flatten(1) for part in (inside, place))
    maxima = torch.cat([maxima, inside], dim=1)
    number = torch.cat([number.expand(len(rows), -1), place], dim=1)
    most = min(count, num_ranges(table.num_items))
    maximum, place = torch.topk(maxima, most, dim=1)
    return maximum, number.gather(1, place)


def _outermost(log_mass: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the masses (N, E) of all processes' first and last ranges, and numbers (E,).

    They alone may be shared, and then have the mass of all shares.
    """
    places = [0, -1] if len(parts) > 1 else [0] * len(parts)
    missing = 2 - len(places)
    number = torch.nn.functional.pad(parts[places], (0, missing), value=-1)
    mass = torch.nn.functional.pad(log_mass[:, places], (0, missing), value=-torch.inf)
    numbers, masses = stacked(number).flatten(), stacked(mass).transpose(0, 1).flatten(1)
    number, index = numbers[numbers >= 0].unique(return_inverse=True)
    masses = masses[:, numbers >= 0]
    found = masses.new_full((len(masses), len(number)), -torch.inf)
    for column, place in enumerate(index.tolist()):
        found[:, place] = torch.logaddexp(found[:, place], masses[:, column])
    return found, number


def _log_p(table: ShardedItems, h: Tensor, lse: Tensor, parts: Tensor) -> Tensor:
    """Return log p of the process's items in ranges (N, m), −inf at others': (N, m, RANGE)."""
    shape = *parts.shape, RANGE
    found = torch.full(shape, -torch.inf, dtype=torch.float64, device=h.device)
    for piece in table.pieces:
        # The first item of the piece begins a range, or the piece is within one.
        shift, begin = piece.first % RANGE, piece.first // RANGE
        row, column = ((parts >= begin) & (parts < begin + num_ranges(len(piece.weight)))).nonzero(
            as_tuple=True
        )
        local = (parts[row, column] - begin)[:, None]
        weight, bias = piece.inputs
        for few in row_blocks(len(row), RANGE):
            n = row[few]
            z = range_logits(h[n], weight, bias, local[few])[:, 0] - lse[n, None]
            found[n, column[few], shift:] = z[:, : RANGE - shift].double()
    return found
