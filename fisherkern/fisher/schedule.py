"""How much work a backward pass takes: the sizes of length buckets and probe blocks."""

from __future__ import annotations

import dataclasses

import torch

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


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Limits on a backward pass, of all its sequences and probes together.

    positions: sequences × probes × positions. gradients: elements of a probe block's
    gradients at all calls where they are needed. columns: elements of its columns of L.
    """

    positions: int
    gradients: int
    columns: int = 2**22

    @classmethod
    def of(cls, device: torch.device) -> Schedule:
        """The schedule that fills `device`."""
        if device.type != "cuda":
            return cls(_CPU_POSITIONS, _CPU_GRADIENTS)
        free, _ = torch.cuda.mem_get_info(device)
        return cls.of_memory(free)

    @classmethod
    def of_memory(cls, free: int) -> Schedule:
        """The schedule for a GPU with `free` bytes."""
        positions = max(1, free * _GPU_POSITIONS_PER_GIB >> 30)
        return cls(positions, free // _GPU_BYTES_PER_GRADIENT, 2**26)

    def sequences(self, length: int, probes: int) -> int:
        """Sequences of `length` positions in a bucket, with blocks of at most `probes` probes."""
        block = min(probes, max(1, self.positions // (_FEWEST_SEQUENCES * length)))
        return self.positions // (block * length)

    def probes(self, gradients: int, columns: int) -> int:
        """Probes in a block, by the elements of one probe's gradients and of its columns."""
        return max(1, min(self.gradients // max(1, gradients), self.columns // max(1, columns)))
