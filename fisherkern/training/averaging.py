"""The exponential moving average of a model's weights along its run."""

from __future__ import annotations

import copy

import torch

from fisherkern.encoders import SequenceEncoder


class WeightAverage:
    """An average of a model's weights along one run: a second member for the cost of a copy.

    After step t = 0, 1, ...   a = d_t a + (1 - d_t) θ,   d_t = min(decay, (1 + t) / (10 + t)),

    which starts from the initial weights and soon forgets them (the schedule of TensorFlow's
    ExponentialMovingAverage). `model` holds the average; integer buffers are copied.
    """

    def __init__(self, model: SequenceEncoder, decay: float) -> None:
        self.model = copy.deepcopy(model).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: SequenceEncoder, step: int) -> None:
        """Take in the weights after step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        new = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                average.lerp_(new[name], 1 - decay)
            else:
                average.copy_(new[name])
