"""The exponential moving average of a model's weights along its run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage(AveragedModel):
    """An average of a model's weights along one run: a second member for the cost of a copy.

    After step t = 0, 1, ...   a = d_t a + (1 - d_t) θ,   d_t = min(decay, (1 + t) / (10 + t)),

    which starts from the initial weights and soon forgets them (the schedule of TensorFlow's
    ExponentialMovingAverage). `module` holds the average; buffers are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=self._mix)
        self.module.eval()
        self.decay, self._rate = decay, 0.0

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after step `step`."""
        self._rate = min(self.decay, (1 + step) / (10 + step))
        # By the step, which a resumed run knows; at 0 the base class would copy the weights.
        self.n_averaged.fill_(step + 1)
        self.update_parameters(model)

    @torch.no_grad()
    def _mix(self, average: Any, new: Any, _: Any) -> None:
        torch._foreach_lerp_(average, new, 1 - self._rate)
