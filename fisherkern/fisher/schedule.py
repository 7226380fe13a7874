"""How a batch is divided: batch > micro-batch > length bucket, and probes into probe blocks.

A micro-batch is what the caller's `chunk` allows at once. A length bucket is the sequences of
one forward pass, of similar lengths. Its probes go back in probe blocks. Item tiles, the last
division, belong to the ops (`ops.softmax_lse.logit_tiles`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.adapters.batches import batch_slice, batch_take, histories, is_jagged

# A CPU core's caches hold 25,600 positions; a GPU is filled by 2²⁰ and more. Each GiB of a GPU's
# free memory takes 40,000: in two layers of D = 64 a quarter of it for the gradients that are
# kept, as much for attention over 200 positions, the rest for what both are made of.
_CPU_POSITIONS, _CPU_GRADIENTS = 25_600, 2**25
_GPU_POSITIONS_PER_GIB = 40_000
# Bytes of a GPU's free memory for each element of the gradients that a probe block keeps: the
# element, and three times as much on its way through a layer and while it is squared.
_GPU_BYTES_PER_GRADIENT = 16
# Sequences that a pass should have where probe blocks could be larger with fewer.
_FEWEST_SEQUENCES = 4
# Positions below which it does not pay to tell lengths apart: calls cost as much.
_FEWEST_POSITIONS = 4096
# Elements of per-sequence gradients that are held at once, where a parameter has several uses
# that no single formula covers.
_STORED_GRADIENTS = 2**24


class Bucket(NamedTuple):
    """Sequences of a batch for one forward pass, and their indices in it, (n,) int64 ascending."""

    batch: Any
    sequences: Tensor


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Limits on a backward pass, of all its sequences and probes together.

    positions: sequences × probes × positions. gradients: elements of a probe block's
    gradients at all ops where they are needed. probe_vectors: elements of its columns of L.
    micro_batch: sequences worked on at once, None for the whole batch.
    """

    positions: int
    gradients: int
    probe_vectors: int = 2**22
    micro_batch: int | None = None

    @classmethod
    def of(cls, device: torch.device) -> Schedule:
        """Return the schedule that fills `device`."""
        if device.type != "cuda":
            return cls(_CPU_POSITIONS, _CPU_GRADIENTS)
        free, _ = torch.cuda.mem_get_info(device)
        return cls.of_memory(free)

    @classmethod
    def of_memory(cls, free: int) -> Schedule:
        """Return the schedule for a GPU with `free` bytes."""
        positions = max(1, free * _GPU_POSITIONS_PER_GIB >> 30)
        return cls(positions, free // _GPU_BYTES_PER_GRADIENT, 2**26)

    @classmethod
    def of_one_probe(cls, micro_batch: int | None) -> Schedule:
        """Return the schedule of work with one backward pass or none: few positions suffice."""
        return cls(_FEWEST_POSITIONS, _CPU_GRADIENTS, micro_batch=micro_batch)

    def micro_batches(self, batch: Any, n: int) -> Iterator[tuple[Any, int, int]]:
        """Yield the batch's `n` sequences in their order: (part, first, last + 1)."""
        size = self._most(batch, n)
        for start in range(0, n, size):
            stop = min(start + size, n)
            yield (batch if size >= n else batch_slice(batch, start, stop)), start, stop

    def _most(self, batch: Any, n: int) -> int:
        """Sequences at once; one of a jagged batch, whose rows do not say which is whose."""
        return 1 if is_jagged(batch) else self.micro_batch or max(n, 1)

    def length_buckets(
        self, model: ModelAdapter, batch: Any, n: int, probes: int = 1
    ) -> Iterator[Bucket]:
        """Yield the `n` sequences of a batch, for blocks of at most `probes` probes.

        From long to short where the model computes no padding that a bucket shares; otherwise
        in their order. Where the number of positions is unknown, a bucket has a micro-batch.
        """
        most = self._most(batch, n)
        history = histories(batch)
        if history is None or not model.skips_padding:
            width = None if history is None else history.shape[1]
            size = most if width is None else min(most, self.sequences(width, probes))
            for index in _even_parts(n, size, width):
                start, stop = int(index[0]), int(index[-1]) + 1
                yield Bucket(batch if len(index) == n else batch_slice(batch, start, stop), index)
            return
        # What an encoder adds to a history is one mask token at most.
        lengths, order = ((history != 0).sum(dim=1) + 1).cpu().sort(descending=True, stable=True)
        while len(order):
            size = min(most, self.sequences(int(lengths[0]), probes))
            index, order, lengths = order[:size].sort().values, order[size:], lengths[size:]
            yield Bucket(batch_take(batch, index), index)

    def sequences(self, length: int, probes: int) -> int:
        """Sequences of `length` positions in a bucket, with blocks of at most `probes` probes."""
        block = min(probes, max(1, self.positions // max(1, _FEWEST_SEQUENCES * length)))
        return max(1, self.positions // max(1, block * length))

    def probe_block(self, gradients: int, vectors: int) -> int:
        """Probes in a block, by the elements of one probe's gradients and of its column of L."""
        by_gradients = self.gradients // max(1, gradients)
        return max(1, min(by_gradients, self.probe_vectors // max(1, vectors)))


def stored_sequences(elements: int) -> int:
    """Sequences whose gradients of so many `elements` are held at once."""
    return max(1, _STORED_GRADIENTS // elements)


def _even_parts(n: int, most: int, width: int | None) -> tuple[Tensor, ...]:
    """0..n−1 in parts of similar sizes, at most `most`, and where possible none of `width`.

    N = T is avoided, because the batch and time dimensions would be indistinguishable.
    """
    if n == 0:
        return ()
    least = -(-n // most)
    for count in range(least, n + 1):
        parts = torch.arange(n).tensor_split(count)
        if all(len(part) != width for part in parts):
            return parts
    return torch.arange(n).tensor_split(least)
