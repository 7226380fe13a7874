"""The training loop: one clear path, the same bits whether or not it was interrupted."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives import MaskedItems, Objective
from fisherkern.training.checkpoint import PathLike, load_state, save_state

OnEpoch = Callable[[int, SequenceEncoder, float], None]


class TrainingData(Protocol):
    """What `train` needs of a data set; `SequenceDataset` has it."""

    item_ids: Any

    @property
    def num_items(self) -> int: ...

    def fingerprint(self) -> str: ...

    def windows(
        self, *, batch_size: int, max_len: int, seed: int, epoch: int, crop: str
    ) -> Any: ...


@dataclasses.dataclass(frozen=True)
class TrainingLog:
    """`losses`: each epoch's mean loss over its steps; `seconds`: wall time of this call."""

    losses: list[float]
    seconds: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """What, with model and data, decides the bits of a run; checked on construction."""

    epochs: int
    batch_size: int
    lr: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    clip: float | None
    betas: tuple[float, float]
    seed: int
    crop: str
    max_len: int

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_len"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.schedule not in ("constant", "linear"):
            raise InputError(f"schedule must be 'constant' or 'linear', got {self.schedule!r}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be positive and finite, got {self.lr}")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip must be positive or None, got {self.clip}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be two numbers in [0, 1), got {self.betas}")


def train(
    model: SequenceEncoder,
    data: TrainingData,
    *,
    objective: Objective | None = None,
    epochs: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    schedule: str = "constant",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    clip: float | None = 5.0,
    betas: tuple[float, float] = (0.9, 0.98),
    seed: int = 0,
    crop: str = "random",
    max_len: int | None = None,
    state: PathLike | None = None,
    save_every: int = 1,
    on_epoch: OnEpoch | None = None,
    progress: bool = True,
) -> TrainingLog:
    """Minimise `objective` (default `MaskedItems(0.2)`) over the windows of `data` with AdamW.

    `learning_rate` gives the rate of each step. Decay acts on matrices only; gradients are
    scaled to a norm of at most `clip` (None: never). `max_len` (default: the model's) and `crop`
    go to `data.windows`. `on_epoch(epoch, model, mean_loss)`, epochs counted from 1, is called
    before the epoch's state is saved.

    With `state`, the run is saved to that file every `save_every` epochs and goes on from it
    if it exists: the file's parameters replace the model's, and the bits are those of a run never
    interrupted (same machine, threads and versions). A finished run returns at once. Random
    numbers depend on (seed, step) alone; the caller's generators are left untouched. Sets
    `model.item_ids`; leaves the model in eval mode.

    Raises InputError for settings out of range, data of another catalogue size, the state of
    another run, and a loss or gradient that is not finite.
    """
    max_len = model.max_len if max_len is None else max_len
    settings = Settings(
        epochs,
        batch_size,
        lr,
        schedule,
        warmup_steps,
        weight_decay,
        clip,
        betas,
        seed,
        crop,
        max_len,
    )
    if data.num_items != model.num_items:
        raise InputError(f"data has {data.num_items} items, the model {model.num_items}")
    if max_len > model.max_len:
        raise InputError(f"max_len = {max_len} exceeds the model's {model.max_len}")
    if save_every < 1:
        raise InputError(f"save_every must be at least 1, got {save_every}")
    objective = MaskedItems(0.2) if objective is None else objective
    return _run(model, data, objective, settings, state, save_every, on_epoch, progress)


def _run(
    model: SequenceEncoder,
    data: TrainingData,
    objective: Objective,
    settings: Settings,
    state: PathLike | None,
    save_every: int,
    on_epoch: OnEpoch | None,
    progress: bool,
) -> TrainingLog:
    started = time.perf_counter()
    optimizer = _optimizer(model, settings)
    run = {
        **dataclasses.asdict(settings),
        "betas": list(settings.betas),  # as JSON gives it back
        "model": {"class": type(model).__name__, **model.config},
        "objective": objective.settings(),
        "data": data.fingerprint(),
    }
    losses: list[float] = []
    step = 0
    if state is not None and Path(state).exists():
        losses, step = load_state(state, model, optimizer, run)
    model.item_ids = list(data.item_ids)
    total = settings.epochs * len(_windows(data, settings, 1))
    with tqdm(total=total, initial=step, unit="step", disable=not progress) as bar:
        for epoch in range(len(losses) + 1, settings.epochs + 1):
            bar.set_description(f"epoch {epoch}/{settings.epochs}")
            model.train()
            epoch_losses = []
            for tokens in _windows(data, settings, epoch):
                loss = _step(model, objective, tokens, optimizer, settings, step, total)
                epoch_losses.append(loss)
                step += 1
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
            losses.append(sum(epoch_losses) / len(epoch_losses))
            if on_epoch is not None:
                on_epoch(epoch, model, losses[-1])
            if state is not None and (epoch % save_every == 0 or epoch == settings.epochs):
                save_state(state, model, optimizer, run, losses, step)
    model.eval()
    return TrainingLog(losses, time.perf_counter() - started, step)


def _windows(data: TrainingData, settings: Settings, epoch: int) -> Any:
    return data.windows(
        batch_size=settings.batch_size,
        max_len=settings.max_len,
        seed=settings.seed,
        epoch=epoch,
        crop=settings.crop,
    )


def learning_rate(step: int, total: int, lr: float, schedule: str, warmup_steps: int) -> float:
    """The rate of step `step` = 0..total-1.

    lr (step + 1) / warmup_steps while that is below lr; after it lr ("constant") or
    lr (total - step) / (total - warmup_steps), zero at `total` ("linear").
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "linear":
        return lr * (total - step) / max(1, total - warmup_steps)
    return lr


def _step(
    model: SequenceEncoder,
    objective: Objective,
    tokens: Tensor,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    step: int,
    total: int,
) -> float:
    device = next(model.parameters()).device
    # Two streams from (seed, step): were they one, what is masked would depend on what is
    # dropped. Nothing is carried over, so a resumed run needs no generator's state.
    entropy = np.random.SeedSequence([settings.seed, step])
    dropout_seed, mask_seed = (int(word) for word in entropy.generate_state(2, np.uint64))
    generator = torch.Generator().manual_seed(mask_seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(dropout_seed)
        loss = objective(model, tokens.to(device), generator)
    rate = learning_rate(step, total, settings.lr, settings.schedule, settings.warmup_steps)
    optimizer.zero_grad()
    loss.backward()
    limit = math.inf if settings.clip is None else settings.clip
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    if not bool(loss.isfinite() & norm.isfinite()):
        raise InputError(
            f"training diverged at step {step} with lr = {rate:g}: "
            f"loss {loss.item()}, gradient norm {norm.item()}"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss.item()


def _optimizer(model: SequenceEncoder, settings: Settings) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
