"""What decides a training run, and the learning rate of each step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fisherkern.checks import (
    check_choice,
    check_count,
    check_not_negative,
    check_positive,
    check_unit,
)
from fisherkern.errors import InputError, shown

CHOICES = {"schedule": ("constant", "linear"), "precision": ("fp32", "bf16")}


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """What decides a run beside model, data and objective: the keyword arguments of `train`.

    Args:
        epochs: passes over the data.
        batch_size: windows in a step, of all processes together.
        lr: AdamW's learning rate; see `learning_rate`.
        schedule: "constant", or "linear" to zero at the last step.
        warmup_steps: steps in which the rate rises to `lr`.
        weight_decay: AdamW's, on matrices only.
        clip: largest norm of the gradient over all parameters; None: no limit.
        betas: AdamW's two, each in [0, 1).
        seed: of the windows and their order, dropout and the objective's draws.
        crop: how windows are cut, see `SequenceDataset.windows`: "random", "last" or "all".
        max_len: items in a window; None: the model's.
        validate_every: epochs between validations; the last epoch is always validated.
        patience: validations in a row without a new best score after which to stop; None: never.
        precision: "fp32", or "bf16" to compute the loss under autocast. Weights, gradients and
            AdamW's moments keep their type.
        compile: send the encoder's `states` through torch.compile; a string names the backend.
        ema: decay of the average of the weights, see `WeightAverage`; None: no average.

    Raises:
        InputError: a value out of range.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip: float | None = 5.0
    betas: tuple[float, float] = (0.9, 0.98)
    seed: int = 0
    crop: str = "random"
    max_len: int | None = None
    validate_every: int = 1
    patience: int | None = None
    precision: str = "fp32"
    compile: bool | str = False
    ema: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_len", "validate_every", "patience"):
            value = getattr(self, name)
            if value is not None:
                check_count(name, value)
        for name in ("seed", "warmup_steps"):
            check_count(name, getattr(self, name), least=0)
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_positive("lr", self.lr)
        check_not_negative("weight_decay", self.weight_decay)
        if self.clip is not None:
            check_positive("clip", self.clip)
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise InputError(f"betas must be two numbers in [0, 1), got {shown(self.betas)}")
        for beta in self.betas:
            check_unit("betas", beta, "[0, 1)")
        betas = tuple(float(beta) for beta in self.betas)  # AdamW takes no integers
        object.__setattr__(self, "betas", betas)
        if self.ema is not None:
            check_unit("ema", self.ema, "[0, 1)")


def number_of(score: Any) -> float:
    """Return a validation score as a number, NaN for what is none."""
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def learning_rate(step: int, total: int, lr: float, schedule: str, warmup_steps: int) -> float:
    """Return the rate of step `step` = 0..total-1.

    lr (step + 1) / warmup_steps while that is below lr; after it lr ("constant") or
    lr (total - step) / (total - warmup_steps), zero at `total` ("linear").
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "linear":
        return lr * (total - step) / max(1, total - warmup_steps)
    return lr
