"""PCRec: two peers that train apart and put each other's unimportant weights to use."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.files import load_tensors, save_tensors
from fisherkern.objectives import MaskedItems, Objective
from fisherkern.progress import progress_bar
from fisherkern.training import processes
from fisherkern.training.loop import (
    Run,
    Saving,
    TrainingData,
    Validate,
    checked_settings,
)
from fisherkern.training.scalars import Scalars
from fisherkern.training.state import PathLike, Progress, check_run, contents, restore

NAMES = ("a", "b")


@dataclasses.dataclass(frozen=True)
class Cooperation:
    """What the peers do to each other's weights θ_a, θ_b after an epoch, both at once.

    "layer":      θ_a, θ_b <- μ θ_a + (1 - μ) θ_b,  μ = sigmoid(alpha (H_a - H_b)) per layer
    "parameter":  θ_a <- θ_b wherever |θ_a| <= γ_a, and the other way round

    H is the `criterion` of a layer's matrix: "entropy" -Σ_b p_b log p_b over `bins` bins of
    equal width between its smallest and largest weight, or "l1" |θ|_1 over the sum of both
    peers'. A layer is a tensor of two dimensions or more and the vectors (biases, norms) after it,
    up to the next; vectors before the first matrix go with it. As μ_b = 1 - μ_a, both
    peers come out of "layer" with the same weights; what sets them apart is their optimiser's
    moments, learning rates and data order. γ is `threshold`, or, where that is None, the
    `percent`-th percentile of the tensor's |θ| (linearly interpolated); "parameter" leaves vectors
    alone. Frozen parameters are mixed as well, buffers never.

    Source: Sun et al., PCRec, arXiv 2111.00429 and its released code, which has the percentile,
    and in whose histogram the largest weight is lost; here it is in the last bin, as in `merge`
    with method "pcrec". Its text, as noted, compares |W| with γ, its equation 7 W alone. Raises
    InputError for unknown names and numbers out of range.
    """

    kind: str = "layer"
    criterion: str = "entropy"
    alpha: float = 30.0
    bins: int = 10
    percent: float = 50.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("kind", ("layer", "parameter")), ("criterion", ("entropy", "l1"))):
            if getattr(self, name) not in known:
                choices = " or ".join(map(repr, known))
                shown = "cooperation" if name == "kind" else name
                raise InputError(f"{shown} must be {choices}, got {getattr(self, name)!r}")
        if not 0 <= self.alpha < math.inf:
            raise InputError(f"alpha must be 0 or more and finite, got {self.alpha}")
        if self.bins < 1:
            raise InputError(f"bins must be at least 1, got {self.bins}")
        if not 0 <= self.percent <= 100:
            raise InputError(f"percent must be in [0, 100], got {self.percent}")
        if self.threshold is not None and not self.threshold >= 0:
            raise InputError(f"threshold must be 0 or more or None, got {self.threshold}")

    @torch.no_grad()
    def __call__(self, a: SequenceEncoder, b: SequenceEncoder) -> None:
        """Change the weights of both, in place; tied ones once."""
        own, theirs = dict(a.named_parameters()), dict(b.named_parameters())
        shares = self._shares(own, theirs) if self.kind == "layer" else {}
        for name, x in own.items():
            y = theirs[name]
            if self.kind == "layer":
                mixed = shares[name] * x.double() + (1 - shares[name]) * y.to(x.device).double()
                x.copy_(mixed)
                y.copy_(mixed)
            elif x.ndim >= 2:
                new = torch.where(self._unimportant(x), y.to(x.device), x)
                y.copy_(torch.where(self._unimportant(y), x.to(y.device), y))
                x.copy_(new)

    def _unimportant(self, weights: Tensor) -> Tensor:
        size = weights.abs()
        if self.threshold is not None:
            return size <= self.threshold
        return size <= float(np.percentile(size.double().cpu().numpy(), self.percent))

    def _shares(self, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
        """μ of every parameter."""
        matrices = {name: self._share(x, theirs[name]) for name, x in own.items() if x.ndim >= 2}
        current = next(iter(matrices.values()), 0.5)
        found = {}
        for name in own:
            current = matrices.get(name, current)
            found[name] = current
        return found

    def _share(self, x: Tensor, y: Tensor) -> float:
        if self.criterion == "entropy":
            difference = entropy(x, self.bins) - entropy(y, self.bins)
        else:
            sums = x.double().abs().sum().item(), y.double().abs().sum().item()
            difference = (sums[0] - sums[1]) / (sum(sums) or 1.0)
        return torch.tensor(self.alpha * difference, dtype=torch.float64).sigmoid().item()


def entropy(weights: Tensor, bins: int) -> float:
    """-Σ_b p_b log p_b of the histogram of all of `weights`, in nats; see `Cooperation`."""
    flat = weights.detach().double().flatten()
    low, high = flat.min(), flat.max()
    width = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    place = ((flat - low) / width * bins).long().clamp(max=bins - 1)
    p = torch.bincount(place, minlength=bins).double() / len(flat)
    return -torch.xlogy(p, p).sum().item()


@dataclasses.dataclass(frozen=True)
class PeersLog:
    """What a run of `train_peers` was like.

    model: the network to keep. peer: "a" or "b", which one it is. losses, scores: as in
    `TrainingLog`, of a and of b. best_epoch: the one whose weights `model` has, None
    without validation. seconds: wall time of this call.
    """

    model: SequenceEncoder
    peer: str
    losses: tuple[list[float], list[float]]
    scores: tuple[dict[int, float], dict[int, float]]
    best_epoch: int | None
    seconds: float


def train_peers(
    model_a: SequenceEncoder,
    model_b: SequenceEncoder,
    data: TrainingData,
    *,
    objective: Objective | None = None,
    cooperation: str = "layer",
    criterion: str = "entropy",
    alpha: float = 30.0,
    bins: int = 10,
    percent: float = 50.0,
    threshold: float | None = None,
    peer_lr: float | None = None,
    peer_seed: int | None = None,
    validate: Validate | None = None,
    state: PathLike | None = None,
    progress: bool = True,
    **settings: Any,
) -> PeersLog:
    """PCRec: train two networks of one kind, let them cooperate after every epoch, keep one.

    Each epoch both peers pass over the data, as `train` does with the same `objective` (default
    `MaskedItems(0.2)`) and `settings`, except that `model_b` has the learning rate `peer_lr`
    (default: half of lr, the released code's) and draws its windows, their order, dropout and masks
    from `peer_seed` (default: seed + 1). Then `validate` scores them, and then they
    cooperate (see `Cooperation` for the other arguments), but not after the last epoch. With
    `validate` both models end with the weights of their best epochs, and the result is the one with
    the higher score, `model_a` if they are equal; without it, `model_a`. `patience` counts
    validations without a new best of either.

    With `state` the run is saved to that file after every epoch and goes on from it if it exists,
    to the same bits as one never interrupted. The caller's generators are left untouched. Sets both
    models' `item_ids`.

    Raises InputError as `train` and `Cooperation` do, for models of different kinds or that share
    tensors, peers with the same learning rate and seed, and for `ema`.
    Source: Sun et al., PCRec, arXiv 2111.00429. Its peers are two processes that wait for each
    other's files; which one is reported is not said in the code.
    """
    started = time.perf_counter()
    rule = Cooperation(cooperation, criterion, alpha, bins, percent, threshold)
    chosen = checked_settings(model_a, data, validate, settings)
    if chosen.ema is not None:
        raise InputError("train_peers: ema averages one network; it has no meaning between peers")
    _check_pair(model_a, model_b)
    other = dataclasses.replace(
        chosen,
        lr=chosen.lr / 2 if peer_lr is None else peer_lr,
        seed=chosen.seed + 1 if peer_seed is None else peer_seed,
    )
    if (other.lr, other.seed) == (chosen.lr, chosen.seed):
        raise InputError("peer_lr and peer_seed are those of the first peer; one must differ")
    objective = MaskedItems(0.2) if objective is None else objective
    with Scalars(None) as scalars:
        quiet = Saving(None, 1, None, None)
        pair = [
            Run(model, data, objective, own, validate, None, quiet, scalars)
            for model, own in ((model_a, chosen), (model_b, other))
        ]
        _Pair(pair, rule, state).go(progress and processes.rank() == 0)
    reached = [run.progress for run in pair]
    best = [-math.inf if p.best_epoch is None else p.scores[p.best_epoch] for p in reached]
    kept = 1 if best[1] > best[0] else 0
    return PeersLog(
        pair[kept].model,
        NAMES[kept],
        (list(reached[0].losses), list(reached[1].losses)),
        (dict(reached[0].scores), dict(reached[1].scores)),
        reached[kept].best_epoch,
        time.perf_counter() - started,
    )


class _Pair:
    """Two runs, what they do to each other, and the file they go on from."""

    def __init__(self, runs: list[Run], rule: Cooperation, path: PathLike | None) -> None:
        self.runs, self.rule, self.path = runs, rule, path
        self.settings = runs[0].settings
        self.identity = dataclasses.asdict(rule)
        for name, run in zip(NAMES, runs, strict=True):
            self.identity |= {f"{name}.{key}": value for key, value in run.identity.items()}
        if path is not None and Path(path).exists():
            self.load(path)

    def go(self, show: bool) -> None:
        total, initial = sum(r.total for r in self.runs), sum(r.progress.step for r in self.runs)
        with progress_bar(total=total, initial=initial, unit="step", show=show) as bar:
            while not self.finished():
                epoch = len(self.runs[0].progress.losses) + 1
                for name, run in zip(NAMES, self.runs, strict=True):
                    bar.set_description(f"epoch {epoch}/{self.settings.epochs} {name}")
                    run.epoch(bar)
                if not self.finished():
                    self.rule(self.runs[0].model, self.runs[1].model)
                self.save()
        for run in self.runs:
            run.trainee.restore_best()
            run.trained.eval()

    def finished(self) -> bool:
        done = [run.progress for run in self.runs]
        return len(done[0].losses) == self.settings.epochs or all(
            own.out_of_patience(self.settings.patience) for own in done
        )

    def save(self) -> None:
        if self.path is None or processes.rank() != 0:
            return
        tensors = {
            f"{name}.{key}": tensor
            for name, run in zip(NAMES, self.runs, strict=True)
            for key, tensor in contents(run.trainee).items()
        }
        reached = [run.progress.to_json() for run in self.runs]
        about = {"kind": "peers", "run": self.identity, "progress": reached}
        save_tensors(self.path, tensors, about)

    def load(self, path: PathLike) -> None:
        tensors, header = load_tensors(path)
        if header.get("kind") != "peers" or "progress" not in header:
            raise InputError(f"{path}: not a state of two peers")
        check_run(path, header["run"], self.identity)
        for name, run, reached in zip(NAMES, self.runs, header["progress"], strict=True):
            own = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{name}.")
            }
            restore(path, run.trainee, own)
            run.progress = Progress.from_json(reached)
            processes.check_same_start(run.progress.step, run.device)


def _check_pair(a: SequenceEncoder, b: SequenceEncoder) -> None:
    if type(a) is not type(b) or a.config != b.config:
        raise InputError(
            f"model_b must be of model_a's class and config, got {type(b).__name__} {b.config} "
            f"beside {type(a).__name__} {a.config}"
        )
    own = {parameter.data_ptr() for parameter in a.parameters()}
    for name, parameter in b.named_parameters():
        if parameter.data_ptr() in own:
            raise InputError(f"model_b: {name} is a tensor of model_a's; train a copy")
