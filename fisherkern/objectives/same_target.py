"""Training samples grouped by the item they end in, in O(actions) memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from fisherkern.objectives.base import TrainingSequences


@dataclasses.dataclass(frozen=True, eq=False)
class SameTarget:
    """CSR from an item to the training samples whose target it is.

    A sample is a place p in `items`, the data set's, after the first item of its user and in
    the user's training part. Its target is items[p], its history the user's
    items before p. Item v has the samples places[starts[v]:starts[v+1]].
    """

    items: Tensor  # (actions,) int32
    offsets: Tensor  # (users + 1,) int64
    places: Tensor  # (samples,) int32, int64 from 2^31 actions on
    starts: Tensor  # (V + 2,) int64

    @classmethod
    def of(cls, data: TrainingSequences) -> SameTarget:
        """Sorts the training samples by target: O(actions) memory, no pairs."""
        items, offsets = np.asarray(data.items), np.asarray(data.offsets, np.int64)
        sample = np.arange(len(items)) < np.repeat(np.asarray(data.train_ends), np.diff(offsets))
        sample[offsets[:-1][offsets[1:] > offsets[:-1]]] = False
        places = np.flatnonzero(sample)
        places = places[np.argsort(items[places], kind="stable")]
        counts = np.bincount(items[places], minlength=data.num_items + 1)
        small = len(items) < 2**31
        return cls(
            torch.from_numpy(items.astype(np.int32)),
            torch.from_numpy(offsets.copy()),
            torch.from_numpy(places.astype(np.int32 if small else np.int64)),
            torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
        )

    def draw(self, history: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """For every row the history (N, T) of another sample with its target, drawn uniformly.

        `history` (N, T) int64 left-padded with 0, `target` (N,) int64. A row that is its
        target's only sample, or of a target that is no training sample's, gets itself.
        """
        if not len(self.places):
            return history
        device, width = history.device, history.shape[1]
        history, target = history.cpu(), target.cpu()
        start = self.starts[target]
        count = self.starts[target + 1] - start
        draws = torch.rand(2, len(target), generator=generator, dtype=torch.float64)
        one = (draws[0] * count).long().minimum((count - 1).clamp(min=0))
        step = 1 + (draws[1] * (count - 1)).long().minimum((count - 2).clamp(min=0))
        other = (one + step) % count.clamp(min=1)
        # `other` is uniform over the samples that are not `one`; taking it where `one` is the
        # row itself makes the result uniform over the samples that are not the row, without
        # knowing which of them the row is.
        found = self._histories(start + one, width)
        own = (found == history).all(dim=1)
        found = torch.where(own[:, None], self._histories(start + other, width), found)
        return torch.where((count > 0)[:, None], found, history).to(device)

    def _histories(self, sample: Tensor, width: int) -> Tensor:
        place = self.places[sample.clamp(max=len(self.places) - 1)].long()
        begin = self.offsets[torch.searchsorted(self.offsets, place, right=True) - 1]
        source = place[:, None] - width + torch.arange(width)
        inside = source >= begin[:, None]
        return self.items[source.clamp(min=0)].long().masked_fill(~inside, 0)
