"""PCRec: two peers that train apart and put each other's unimportant weights to use."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherkern import processes
from fisherkern.checks import check_choice, check_count, check_not_negative
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.members.layers import entropy, histogram, over_layers
from fisherkern.objectives import MaskedItems, Objective
from fisherkern.progress import progress_bar
from fisherkern.training import distributed
from fisherkern.training.loggers import RunScalars
from fisherkern.training.loop import TrainingData, TrainLoop, Validate, checked_settings
from fisherkern.training.state import (
    CheckpointPolicy,
    PathLike,
    check_run,
    contents,
    is_state,
    read_progress,
    read_state,
    restore,
    write_state,
)

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
            check_choice("cooperation" if name == "kind" else name, getattr(self, name), known)
        check_not_negative("alpha", self.alpha)
        check_count("bins", self.bins)
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
        return over_layers(own, matrices, 0.5)

    def _share(self, x: Tensor, y: Tensor) -> float:
        if self.criterion == "entropy":
            difference = weight_entropy(x, self.bins) - weight_entropy(y, self.bins)
        else:
            sums = x.double().abs().sum().item(), y.double().abs().sum().item()
            difference = (sums[0] - sums[1]) / (sum(sums) or 1.0)
        return torch.tensor(self.alpha * difference, dtype=torch.float64).sigmoid().item()


def weight_entropy(weights: Tensor, bins: int) -> float:
    """Return the entropy of the histogram of all of `weights`, in nats; see `Cooperation`."""
    flat = weights.detach().double().flatten()
    return entropy(histogram(flat, flat.min(), flat.max(), bins)).item()


@dataclasses.dataclass(frozen=True)
class PeersLog:
    """What a run of `train_peers` was like.

    Args:
        model: the network to keep.
        peer: "a" or "b", which one it is.
        losses: each epoch's mean loss, of a and of b.
        scores: validation score by epoch, of a and of b.
        best_epoch: the epoch whose weights `model` has; None without validation.
        seconds: wall time of this call.
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
    """Train two networks of one kind, let them cooperate after every epoch, and keep one (PCRec).

    Each epoch both peers pass over the data as `train` does. Then `validate` scores them, and then
    they cooperate (see `Cooperation`), but not after the last epoch. With `validate` both models
    end with the weights of their best epochs. The caller's generators are left untouched. Sets both
    models' `item_ids`.

    Args:
        model_a: the first peer, trained in place.
        model_b: the second, of the same class and config, sharing no tensor.
        data: the sequences.
        objective: the loss of both; None: `MaskedItems(0.2)`.
        cooperation: "layer" or "parameter".
        criterion: "entropy" or "l1", which layer is the better.
        alpha: how sharply the criterion decides.
        bins: of the entropy's histogram.
        percent: percentile of |θ| below which "parameter" takes the other's weight.
        threshold: the same as a number; None: by `percent`.
        peer_lr: model_b's learning rate; None: half of lr, the released code's.
        peer_seed: model_b's seed of windows, order, dropout and masks; None: seed + 1.
        validate: gives the score of an epoch, validate(model), higher being better.
        state: file, or folder x.dcp, to save the run to after every epoch, and to go on from if
            it exists, to the same bits as a run never interrupted.
        progress: show a progress bar.
        **settings: the fields of `TrainingSettings`; `patience` counts validations without a new
            best of either peer.

    Returns:
        The peer with the higher validation score, model_a if they are equal or without `validate`,
        and what the run was like.

    Raises:
        InputError: what `train` and `Cooperation` refuse, models of different kinds or that share
            tensors, peers with the same learning rate and seed, and `ema`.

    Source:
        Sun et al., PCRec, arXiv 2111.00429. Its peers are two processes that wait for each other's
        files; which one is reported is not said in the code.
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
    with RunScalars(None) as scalars:
        quiet = CheckpointPolicy(None, 1, None, None)
        pair = [
            TrainLoop(model, data, objective, own, validate, None, quiet, scalars)
            for model, own in ((model_a, chosen), (model_b, other))
        ]
        saving = CheckpointPolicy(state, 1, None, None)
        _Pair(pair, rule, saving).go(progress and processes.rank() == 0)
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

    def __init__(self, runs: list[TrainLoop], rule: Cooperation, saving: CheckpointPolicy) -> None:
        self.runs, self.rule, self.saving, path = runs, rule, saving, saving.path
        self.settings = runs[0].settings
        self.identity = dataclasses.asdict(rule)
        for name, run in zip(NAMES, runs, strict=True):
            self.identity |= {f"{name}.{key}": value for key, value in run.identity.items()}
        if path is not None:
            for name, run in zip(NAMES, runs, strict=True):
                self.identity[f"{name}.start"] = run.state.start()
        if path is not None and is_state(path):
            self.load(path)

    def go(self, show: bool) -> None:
        """Run the epochs that are left."""
        try:
            self._go(show)
        finally:
            for name, run in zip(NAMES, self.runs, strict=True):
                run.state.leave(self.identity.get(f"{name}.start", {}))

    def _go(self, show: bool) -> None:
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
            run.state.restore_best()
            run.trained.eval()

    def finished(self) -> bool:
        done = [run.progress for run in self.runs]
        return len(done[0].losses) == self.settings.epochs or all(
            own.out_of_patience(self.settings.patience) for own in done
        )

    def save(self) -> None:
        if self.saving.path is None or not self.saving.writes:
            return
        tensors = {
            f"{name}.{key}": tensor
            for name, run in zip(NAMES, self.runs, strict=True)
            for key, tensor in contents(run.state).items()
        }
        reached = [run.progress.to_json() for run in self.runs]
        about = {"kind": "peers", "run": self.identity, "progress": reached}
        write_state(self.saving.path, tensors, about)

    def load(self, path: PathLike) -> None:
        tensors, header = read_state(path)
        reached = header.get("progress")
        if header.get("kind") != "peers" or not isinstance(reached, list) or len(reached) != 2:
            raise InputError(f"{path}: not a state of two peers")
        check_run(path, header.get("run"), self.identity)
        found = [read_progress(path, fields) for fields in reached]
        one, other = (len(own.losses) for own in found)
        if one != other or one > self.settings.epochs:
            raise InputError(
                f"{path}: its peers made {one} and {other} epochs of {self.settings.epochs}"
            )
        for name, run, progress in zip(NAMES, self.runs, found, strict=True):
            own = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{name}.")
            }
            restore(path, run.state, own)
            run.progress = progress
            distributed.check_same_start(run.progress.step, run.device)


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
