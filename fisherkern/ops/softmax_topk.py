"""The K most probable items of every row, with the softmax's log-sum-exp and mean."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.ops.backend import on_gpu, use_triton
from fisherkern.ops.library import register_op
from fisherkern.ops.softmax_lse import logit_tiles, reference_logits
from fisherkern.ops.softmax_moments import OnlineMean

MAX_TRITON_K = 128  # what a program's registers hold of candidates

_GROUP = 32  # items whose maximum says whether to look at them


def _select(z: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k largest of each row, of equal ones the lower ids: (N, C) z, ids -> (N, k), unordered."""
    values, index = torch.topk(z, k, dim=1)
    # topk breaks ties as it likes; only rows with a tie across the cut need a full sort.
    tied = (z >= values[:, -1:]).sum(dim=1) > k
    if tied.any():
        rows = tied.nonzero().squeeze(1)
        by_id = torch.argsort(ids[rows], dim=1)
        order = torch.argsort(z[rows].gather(1, by_id), dim=1, descending=True, stable=True)
        index[rows] = by_id.gather(1, order)[:, :k]
    return z.gather(1, index), ids.gather(1, index)


def ordered_items(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by (value descending, id ascending)."""
    ids, order = torch.sort(ids, dim=1)
    values, order = torch.sort(values.gather(1, order), dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


_LOW_WORD = 2**32 - 1


def _packed(z: Tensor, start: int) -> Tensor:
    """Keys (N, C) int64 in the order of fp32 logits, of equal ones the lower item first."""
    # Adding 0 makes -0 the 0 that it equals. A float's bits ascend with it, a negative one's not.
    bits = (z + 0.0).view(torch.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    items = torch.arange(start, start + z.shape[1], device=z.device)
    return (ascending.long() << 32) | (_LOW_WORD - items)


def _unpacked(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(logits fp32, items int64) of keys."""
    ascending = (keys >> 32).int()
    bits = ascending ^ ((ascending >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), _LOW_WORD - (keys & _LOW_WORD)


class _PackedTopk:
    """`_OnlineTopk` for fp32 on a GPU: no tie to look for, nothing to wait for."""

    def __init__(self, h: Tensor, k: int) -> None:
        self._k = k
        self._keys = torch.empty((h.shape[0], 0), dtype=torch.int64, device=h.device)

    def add(self, z: Tensor, start: int) -> Tensor:
        """Take from z (N, C) of the items from `start` on; returns z's row maxima (N,)."""
        keys = _packed(z, start)
        keys = torch.topk(keys, min(self._k, keys.shape[1]), dim=1, sorted=False).values
        keys = torch.cat((self._keys, keys), dim=1)
        self._keys = torch.topk(keys, min(self._k, keys.shape[1]), dim=1).values
        return z.amax(dim=1)

    def finish(self) -> tuple[Tensor, Tensor]:
        """(logits, ids), (N, k) each, the largest first."""
        return _unpacked(self._keys)


class _OnlineTopk:
    """The k largest of a stream of tiles, whose items come in ascending order."""

    def __init__(self, h: Tensor, k: int) -> None:
        self._k = k
        self._values = h.new_empty((h.shape[0], 0), dtype=torch.promote_types(h.dtype, torch.float))
        self._ids = h.new_empty((h.shape[0], 0), dtype=torch.int64)

    def add(self, z: Tensor, start: int) -> Tensor:
        """Take from z (N, C) of the items from `start` on; returns z's row maxima (N,)."""
        if missing := -z.shape[1] % _GROUP:
            padded = torch.nn.functional.pad(z, (0, missing), value=-torch.inf)
        else:
            padded = z
        groups: Tensor = padded.unflatten(1, (-1, _GROUP))
        peaks = groups.amax(dim=2)
        least = self._least(peaks)
        if least is None:
            ids = torch.arange(start, start + z.shape[1], device=z.device).expand(z.shape[0], -1)
            both = torch.cat((self._values, z), dim=1), torch.cat((self._ids, ids), dim=1)
            self._values, self._ids = _select(*both, min(self._k, both[0].shape[1]))
            return peaks.amax(dim=1)
        row, group = (peaks > least[:, None]).nonzero().unbind(1)
        if len(row) > 0:
            few = groups[row, group]
            pair, place = (few > least[row, None]).nonzero().unbind(1)
            self._enter(row[pair], start + group[pair] * _GROUP + place, few[pair, place])
        return peaks.amax(dim=1)

    def _least(self, peaks: Tensor) -> Tensor | None:
        """Return what an item must exceed to be looked at (N,); None where all must be.

        Among equal items the lower ids, which came first, stay: once there are k, only
        larger ones enter, and after some tiles few groups have any. Before, k groups with
        a maximum as large as the k-th largest of them hold k items as large as that.
        """
        if self._values.shape[1] == self._k:
            return self._values.amin(dim=1)
        if peaks.shape[1] < self._k:
            return None
        least = torch.topk(peaks, self._k, dim=1, sorted=False).values.amin(dim=1)
        least = least.nextafter(torch.full_like(least, -torch.inf))
        return least if bool(least.isfinite().all()) else None

    def _enter(self, row: Tensor, item: Tensor, value: Tensor) -> None:
        """Items (U,) with their rows, ascending, and logits."""
        rows, index, counts = torch.unique_consecutive(row, return_inverse=True, return_counts=True)
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[index]
        # Unused places lose against every item, an impossible one included.
        values = value.new_full((len(rows), int(counts.max())), -torch.inf)
        ids = torch.full_like(values, torch.iinfo(torch.int64).max, dtype=torch.int64)
        values[index, place], ids[index, place] = value, item
        values = torch.cat((self._values[rows], values), dim=1)
        ids = torch.cat((self._ids[rows], ids), dim=1)
        values, ids = _select(values, ids, self._k)
        if len(rows) == len(self._values):
            self._values, self._ids = values, ids
        else:
            self._values[rows], self._ids[rows] = values, ids

    def finish(self) -> tuple[Tensor, Tensor]:
        """(logits, ids), (N, k) each, the largest first."""
        return ordered_items(self._values, self._ids)


def _outputs(
    h: Tensor, weight: Tensor, k: int, **_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, dtype = len(h), torch.promote_types(h.dtype, torch.float32)
    p, ids = h.new_empty((n, k), dtype=dtype), h.new_empty((n, k), dtype=torch.int64)
    return p, ids, h.new_empty((n,), dtype=dtype), h.new_empty((n, weight.shape[1]), dtype=dtype)


@register_op(_outputs)
def softmax_topk(
    h: Tensor, weight: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the k most likely items of every row, with log-sum-exp and mean item vector.

        p_n(v) = exp(h_n · w_v + b_v − lse_n),   w̄_n = Σ_v p_n(v) w_v

    One streamed pass over the items: two matrix products of N·V·D; on a GPU three, as w̄ has a
    kernel of its own. Holds one tile of logits, and N·k candidates for each range of items worked
    on at once. Above k = 128 every backend takes PyTorch's path.

    Args:
        h: (N, D) hidden states.
        weight: (V, D) item vectors.
        bias: (V,), or None for none.
        k: Items per row, 1 to V.

    Returns:
        p (N, k) in descending order, ids (N, k) int64, lse (N,) and w̄ (N, D); all but ids are fp32
        or wider. Ties go to the lower id.
    """
    if k <= MAX_TRITON_K and use_triton("softmax_topk", h, weight, bias):
        from fisherkern.ops import softmax_topk_triton

        candidates, places, lse, mean = softmax_topk_triton.softmax_topk(h, weight, bias, k)
        values, ids = ordered_items(*_select(candidates, places, k))
        # Only a row with NaN has fewer items than k to choose from.
        return (values - lse[:, None]).exp(), ids.clamp_(max=weight.shape[0] - 1), lse, mean
    moments = OnlineMean(h, weight)
    packed = on_gpu(h) and h.dtype != torch.float64
    best = _PackedTopk(h, k) if packed else _OnlineTopk(h, k)
    for start, stop, z in logit_tiles(h, weight, bias):
        top = best.add(z, start)
        moments.add(z, weight[start:stop], top)
    values, ids = best.finish()
    lse, mean = moments.finish()
    return (values - lse[:, None]).exp(), ids, lse, mean


def softmax_topk_reference(
    h: Tensor, weight: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the fp64 twin of `softmax_topk`; holds all logits and sorts them."""
    z = reference_logits(h, weight, bias)
    values, ids = torch.sort(z, dim=1, descending=True, stable=True)
    lse = torch.logsumexp(z, dim=1)
    return (values[:, :k] - lse[:, None]).exp(), ids[:, :k], lse
