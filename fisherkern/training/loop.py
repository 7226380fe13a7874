"""The training loop: one clear path, the same bits whether or not it was interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from fisherkern import processes
from fisherkern.adapters.sharded.models import check_whole
from fisherkern.checks import check_callable, takes_numpy
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError, shown
from fisherkern.fingerprint import json_sha256
from fisherkern.objectives import MaskedItems, Objective
from fisherkern.objectives.batch_loss import BatchLoss
from fisherkern.progress import progress_bar
from fisherkern.training import distributed
from fisherkern.training.cpu_kernels import FastCPUKernels, backward
from fisherkern.training.loggers import RunScalars, ScalarLogger
from fisherkern.training.settings import TrainingSettings, learning_rate, number_of
from fisherkern.training.state import (
    CheckpointPolicy,
    PathLike,
    TrainProgress,
    TrainState,
    is_state,
    load_state,
    save_state,
)
from fisherkern.training.weight_average import WeightAverage

OnEpoch = Callable[[int, SequenceEncoder, float], None]
Validate = Callable[[SequenceEncoder], float]


class TrainingData(Protocol):
    """What `train` needs of a data set; `SequenceDataset` has it."""

    item_ids: Any

    @property
    def num_items(self) -> int:
        """V, the size of the catalogue."""

    def fingerprint(self) -> str:
        """Return a hash of the content."""

    def windows(self, *, batch_size: int, max_len: int, seed: int, epoch: int, crop: str) -> Any:
        """Return the batches of one epoch, (N, max_len) int64 each."""


@dataclasses.dataclass(frozen=True)
class TrainingLog:
    """What a run was like.

    Args:
        losses: each epoch's mean loss over its targets, summed over the objective's terms.
        seconds: wall time of this call.
        steps: steps made, by earlier calls too.
        scores: validation score by epoch, counted from 1.
        best_epoch: the epoch whose weights the model has; None without validation.
        ema: the averaged weights as a model of their own; None without `ema`.
    """

    losses: list[float]
    seconds: float
    steps: int
    scores: dict[int, float]
    best_epoch: int | None
    ema: SequenceEncoder | None


@takes_numpy
def train(
    model: SequenceEncoder,
    data: TrainingData,
    *,
    objective: Objective | None = None,
    validate: Validate | None = None,
    on_epoch: OnEpoch | None = None,
    state: PathLike | None = None,
    save_every: int = 1,
    save_every_steps: int | None = None,
    save_every_seconds: float | None = None,
    log_dir: PathLike | None = None,
    logger: ScalarLogger | None = None,
    progress: bool = True,
    **settings: Any,
) -> TrainingLog:
    """Minimise `objective` over the windows of `data` with AdamW.

    The step's loss is the objective's mean over the targets of a batch of windows, its gradient
    clipped; a batch without a target changes nothing. Random numbers depend on (seed, step) alone;
    the caller's generators are left untouched. Sets `model.item_ids` and leaves the model in eval
    mode.

    With `state` an interrupted run goes on from that file: its tensors replace those of the model
    and of the objective's modules, and the bits are those of a run never interrupted (same machine,
    threads, processes and versions; with `compile`, as far as the compiler repeats itself). A
    finished run returns at once.

    Where `torch.distributed` is initialised, every process calls this with the same arguments, a
    step's `batch_size` windows are shared out, and gradients are averaged by
    DistributedDataParallel: to rounding, the single process's result where nothing is dropped out
    (see `BatchLoss`). Process 0 alone calls `validate` and `on_epoch` and writes; all read `state`.

    Args:
        model: the encoder to train, in place.
        data: the sequences; their catalogue is the model's.
        objective: the loss; None: `MaskedItems(0.2)`.
        validate: gives the score of an epoch, validate(model), higher being better; at the end the
            model has the weights of the best epoch. None: of the last. Its attribute `metric`,
            where it has one, tells one run from another.
        on_epoch: called as on_epoch(epoch, model, mean_loss), epochs counted from 1, before the
            epoch's state is saved.
        state: file to save the run to, and to go on from if it exists, or a folder x.dcp of
            `torch.distributed.checkpoint`. A run is known by its settings, its data and the weights
            that it starts from.
        save_every: epochs between saves.
        save_every_steps: steps between saves inside an epoch; None: none.
        save_every_seconds: seconds between saves inside an epoch; None: none.
        log_dir: folder for TensorBoard: loss, learning rate and gradient norm of every step, the
            score of every validation.
        logger: gets the same values by logger.log(values, step), steps counted from 0 over all
            calls of the run; a step after the last save of an interrupted run comes twice.
        progress: show a progress bar.
        **settings: the fields of `TrainingSettings`, `epochs` among them.

    Returns:
        Losses, scores, steps and seconds, and the averaged model with `ema`.

    Raises:
        InputError: settings out of range, data of another catalogue size, the state of another run,
            a missing TensorBoard, a logger without `log`, data with nothing to learn from, or a
            loss, gradient or score that is not finite.
    """
    chosen = checked_settings(model, data, validate, settings)
    check_callable("validate", validate)
    check_callable("on_epoch", on_epoch)
    saving = CheckpointPolicy(state, save_every, save_every_steps, save_every_seconds)
    objective = MaskedItems(0.2) if objective is None else objective
    if not isinstance(objective, Objective):
        raise InputError(f"objective: {shown(objective)} is no objective, as NextItem() is one")
    with RunScalars(log_dir, logger) as scalars:
        run = TrainLoop(model, data, objective, chosen, validate, on_epoch, saving, scalars)
        return run.go(progress and processes.rank() == 0)


def checked_settings(
    model: SequenceEncoder, data: TrainingData, validate: Validate | None, settings: dict[str, Any]
) -> TrainingSettings:
    """Fill in `max_len`; raise InputError where the settings do not fit the rest."""
    if not isinstance(model, SequenceEncoder):
        raise InputError(f"model: a {type(model).__name__} is no encoder of fisherkern")
    if not all(hasattr(data, name) for name in ("num_items", "item_ids", "windows")):
        raise InputError(f"data: a {type(data).__name__} is no data set")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("model: it has no trainable parameter")
    check_whole(model, "training")
    chosen = TrainingSettings(**settings)
    max_len = model.max_len if chosen.max_len is None else chosen.max_len
    chosen = dataclasses.replace(chosen, max_len=max_len)
    if data.num_items != model.num_items:
        raise InputError(f"data has {data.num_items} items, the model {model.num_items}")
    if max_len > model.max_len:
        raise InputError(f"max_len = {max_len} exceeds the model's {model.max_len}")
    if chosen.patience is not None and validate is None:
        raise InputError("patience needs validate, which gives the score of an epoch")
    return chosen


class TrainLoop:
    """A model on its way: one call of `train`, or one of the peers in `train_peers`."""

    def __init__(
        self,
        model: SequenceEncoder,
        data: TrainingData,
        objective: Any,
        settings: TrainingSettings,
        validate: Validate | None,
        on_epoch: OnEpoch | None,
        saving: CheckpointPolicy,
        scalars: RunScalars,
    ) -> None:
        self.started = time.perf_counter()
        max_len = settings.max_len or model.max_len
        self.model, self.data, self.settings = model, data, settings
        self.validate, self.on_epoch = validate, on_epoch
        self.saving, self.scalars = saving, scalars
        self.saved = self.started
        self.device = next(model.parameters()).device
        objective = objective.bind(data, max_len)
        self.width = max_len + objective.lookahead
        modules = {name: m.to(self.device) for name, m in objective.modules().items()}
        parts = {"model": model, **{f"objective.{name}": m for name, m in modules.items()}}
        self.trained = nn.ModuleList(parts.values())
        self.average = None if settings.ema is None else WeightAverage(model, settings.ema)
        if self.average is not None:
            parts["ema"] = self.average.module
        self.optimizer = _optimizer(self.trained, settings)
        self.state = TrainState(parts, self.optimizer)
        self.identity = {
            **dataclasses.asdict(settings),
            "betas": list(settings.betas),  # as JSON gives it back
            "model": {"class": type(model).__name__, **model.config},
            "objective": objective.settings(),
            "data": data.fingerprint(),
            "attributes": json_sha256(getattr(data, "attributes", None)),
            "validation": getattr(validate, "metric", validate is not None),
        }
        self.progress = TrainProgress()
        if saving.path is not None:
            self.identity["start"] = self.state.start()
        if saving.path is not None and is_state(saving.path):
            self.progress = load_state(saving.path, self.state, self.identity)
            if (made := len(self.progress.losses)) > settings.epochs:
                raise InputError(f"{saving.path}: its run made {made} of {settings.epochs} epochs")
        distributed.check_same_start(self.progress.step, self.device)
        compiled = {}
        if settings.compile:
            compiled["states"] = torch.compile(model.states, backend=_backend(settings.compile))
        self.loss = distributed.wrap_ddp(BatchLoss(model, objective, modules, compiled))
        for part in (model, parts.get("ema", model)):
            part.item_ids = list(data.item_ids)
        first_epoch = self.windows(1)
        if not any(objective.targets(model, tokens) for tokens in first_epoch):
            raise InputError(f"no user has {objective.needs} to train on")
        self.total = settings.epochs * len(first_epoch)

    def windows(self, epoch: int) -> Any:
        """Return the epoch's batches, with the objective's lookahead."""
        return self.data.windows(
            batch_size=self.settings.batch_size,
            max_len=self.width,
            seed=self.settings.seed,
            epoch=epoch,
            crop=self.settings.crop,
        )

    def go(self, show: bool) -> TrainingLog:
        """Run the epochs that are left; with a progress bar if `show`."""
        try:
            return self._go(show)
        finally:
            self.state.leave(self.identity.get("start", {}))

    def _go(self, show: bool) -> TrainingLog:
        now, settings = self.progress, self.settings
        self.scalars.resume(now.step)
        with progress_bar(total=self.total, initial=now.step, unit="step", show=show) as bar:
            while len(now.losses) < settings.epochs and not now.out_of_patience(settings.patience):
                bar.set_description(f"epoch {len(now.losses) + 1}/{settings.epochs}")
                self.epoch(bar)
        self.state.restore_best()
        self.trained.eval()
        return TrainingLog(
            list(now.losses),
            time.perf_counter() - self.started,
            now.step,
            dict(now.scores),
            now.best_epoch,
            None if self.average is None else cast(SequenceEncoder, self.average.module),
        )

    def epoch(self, bar: Any) -> None:
        """Run the epoch after `progress.losses`, or what is left of it."""
        now, epoch = self.progress, len(self.progress.losses) + 1
        self.trained.train()
        for tokens in itertools.islice(self.windows(epoch), now.batch, None):
            loss, losses, targets = self.step(tokens)
            now.add(losses, targets)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            self.save_inside()
        now.end_epoch()
        last = epoch == self.settings.epochs
        if self.validate is not None and (last or epoch % self.settings.validate_every == 0):
            self.score(epoch)
        if self.on_epoch is not None and processes.rank() == 0:
            with processes.alone():
                self.on_epoch(epoch, self.model, now.losses[-1])
        last = last or now.out_of_patience(self.settings.patience)
        if last or epoch % self.saving.every == 0:
            self.save()

    def score(self, epoch: int) -> None:
        """Validate, and keep the weights if they are the best so far."""
        self.trained.eval()
        score = 0.0
        if processes.rank() == 0:
            assert self.validate is not None
            with processes.alone():
                score = number_of(self.validate(self.model))
        score = distributed.from_first_process(score, self.device)
        if not math.isfinite(score):
            raise InputError(f"validate gave {score} after epoch {epoch}")
        self.progress.scores[epoch] = score
        self.scalars.log({"validation": score}, self.progress.step - 1)
        if self.progress.best_epoch == epoch:
            self.state.keep_best()

    def save_inside(self) -> None:
        """Save between two steps of an epoch, when it is time."""
        steps, seconds = self.saving.every_steps, self.saving.every_seconds
        late = seconds is not None and time.perf_counter() - self.saved >= seconds
        if seconds is not None and self.saving.together:  # clocks differ
            late = distributed.from_first_process(float(late), self.device) > 0
        if late or (steps is not None and self.progress.step % steps == 0):
            self.save()

    def save(self) -> None:
        """Save the state where there is a file for it; process 0 alone, or all a folder."""
        if self.saving.path is not None and self.saving.writes:
            save_state(self.saving.path, self.state, self.progress, self.identity)
            self.saved = time.perf_counter()

    def step(self, tokens: Tensor) -> tuple[float, list[float], list[int]]:
        """One step on one batch of windows: the loss, its terms, and their numbers of targets.

        Without a target there is no step of the optimiser, whose weight decay would go on.
        """
        settings, step = self.settings, self.progress.step
        # A compiler would have to look into the mode at every call, and has its own ways.
        kernels = contextlib.nullcontext() if settings.compile else FastCPUKernels()
        bf16 = settings.precision == "bf16"
        with (
            self.drawing(step) as generator,
            torch.autocast(self.device.type, torch.bfloat16, enabled=bf16),
            kernels,
        ):
            loss, terms, targets = self.loss(tokens.to(self.device), generator)
        rate = learning_rate(
            step, self.total, settings.lr, settings.schedule, settings.warmup_steps
        )
        self.optimizer.zero_grad()
        if settings.compile:
            loss.backward()
        else:
            backward(loss)
        limit = math.inf if settings.clip is None else settings.clip
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), limit)
        value, *losses = distributed.mean_over_processes(
            torch.cat([loss.detach()[None], terms])
        ).tolist()
        size = norm.item()
        if not math.isfinite(value + size):
            raise InputError(
                f"training diverged at step {step} with lr = {rate:g}: "
                f"loss {value}, gradient norm {size}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if any(targets):
            self.optimizer.step()
        if self.average is not None and any(targets):
            self.average.update(self.model, step)
        self.scalars.log({"loss": value, "learning_rate": rate, "gradient_norm": size}, step)
        return value, losses, targets

    @contextlib.contextmanager
    def drawing(self, step: int) -> Iterator[torch.Generator]:
        """Fix the random numbers of a step: the objective's generator, and torch's for dropout.

        Two streams from (seed, step): were they one, what is masked would depend on what is
        dropped. Nothing is carried over, so a resumed run needs no generator's state. Processes
        make the same draws for the whole batch, and drop out differently, each on its rows.
        """
        seed = self.settings.seed
        _, draws = np.random.SeedSequence([seed, step]).generate_state(2, np.uint64)
        dropout = np.random.SeedSequence([seed, step, processes.rank()])
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(dropout.generate_state(1, np.uint64)[0]))
            yield torch.Generator().manual_seed(int(draws))


def _backend(name: bool | str) -> str:
    name = "inductor" if name is True else str(name)
    if name not in torch._dynamo.list_backends(exclude_tags=()):
        raise InputError(f"compile: {shown(name)} is no backend of torch.compile")
    return name


def _optimizer(trained: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    parameters = [p for p in trained.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
