"""repair(): a merged model's activations given the members' means and deviations again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fisherkern import processes
from fisherkern.checks import check_loader
from fisherkern.errors import InputError
from fisherkern.members import checks
from fisherkern.members.ties import find_ties

ModelT = TypeVar("ModelT", bound=nn.Module)


def repair(
    model: ModelT,
    members: Sequence[ModelT],
    loader: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    modules: Sequence[str] | None = None,
) -> ModelT:
    """Rescale a merged model's activations to its members' means and deviations (REPAIR).

    For every channel of a module's output

        y' = (y - mean(y)) std* / std(y) + mean*,
        mean* = sum_m lambda_m mean(y_m),  std* = sum_m lambda_m std(y_m)

    by a change of gain and bias alone. Averaged weights shrink the spread of activations ("variance
    collapse"); this gives it back, and inference costs the same. A channel without spread in
    `model` keeps its gain and gets the mean. Runs each member once and the copy once per module
    over the loader, in eval mode. Several processes deal out the histories.

    Args:
        model: The merged model; left as it is.
        members: The models it was merged from. Only aligned members have channels that mean the
            same: see `align`.
        loader: Unlabelled batches, (N, T) item ids padded with 0 on the left or mappings with these
            under "history"; gone through once and kept. Means and deviations (divided by the
            number) are over all positions that a module is computed at, and never over padding:
            histories are run grouped by length.
        weights: lambda, in the order of `members`. Default: equal.
        modules: Names of layer norms with gain and bias, or of linear layers with a bias, whose
            weight no other module shares. They are done one after another in the order they run,
            each on what the ones before it now give. Default: all layer norms.

    Returns:
        A copy of `model` with other gains and biases.

    Raises:
        InputError: A module is not such a layer, the loader has no items, or arguments do not fit.

    Source: Jordan et al., REPAIR, arXiv 2211.08403, equations 1 to 3.
    """
    members = list(members)
    with processes.together() as same:
        if not members:
            raise InputError("there is no member to take statistics from")
        checks.check_members([model, *members])
        lam = checks.check_weights(weights, len(members))
        check_loader(loader)
        groups = list(_by_length(loader))
        if not groups:
            raise InputError("loader gives no history with an item")
        target = copy.deepcopy(model)
        names = _modules(target, modules)
        shapes = [own.shape for own in groups]
        same |= checks.compared([model, *members], weights=lam, modules=names, loader=shapes)
    found = [_statistics(member, names, groups) for member in members]
    order = list(_statistics(target, names, groups[:1]))
    for name in order:
        layer: Any = target.get_submodule(name)
        _, mean, deviation = _statistics(target, [name], groups)[name]
        pairs = list(zip(lam, found, strict=True))
        wanted_mean = torch.stack([share * own[name][1] for share, own in pairs]).sum(0)
        wanted = torch.stack([share * own[name][2] for share, own in pairs]).sum(0)
        scale = torch.where(deviation > 0, wanted / deviation, 1.0)
        with torch.no_grad():
            factor = scale if layer.weight.dim() == 1 else scale[:, None]
            layer.weight.copy_(layer.weight.double() * factor)
            layer.bias.copy_((layer.bias.double() - mean) * scale + wanted_mean)
    return target


def _by_length(loader: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the loader's histories without padding, (n, T) each, but those without an item."""
    for number, batch in enumerate(loader):
        history = batch.get("history") if isinstance(batch, Mapping) else batch
        if not isinstance(history, Tensor) or history.dim() != 2:
            raise InputError(f"batch {number} of the loader is no (N, T) tensor of histories")
        width = history.shape[1]
        lengths = width - (history != 0).int().argmax(dim=1)
        lengths[(history == 0).all(dim=1)] = 0
        for length in lengths.unique().tolist():
            if length:
                yield history[lengths == length, width - length :]


def _modules(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Return the names, checked; all layer norms for None."""
    if names is None:
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.LayerNorm) and module.elementwise_affine
        ]
        if not names:
            raise InputError(
                f"{type(model).__name__} has no layer norm to repair: name its modules"
            )
    known = dict(model.named_modules())
    shared = {
        name
        for tie in find_ties(model, "the model")
        if tie.aliases
        for name in (tie.name, *tie.aliases)
    }
    for name in names:
        module: Any = known.get(name)
        if not isinstance(module, nn.LayerNorm | nn.Linear) or module.bias is None:
            raise InputError(
                f"module {name!r} is no layer norm or linear layer with a bias of the model"
            )
        for own in (f"{name}.weight", f"{name}.bias"):
            if own in shared:
                raise InputError(f"tensor {own!r} is shared, so its module cannot be repaired")
    return list(names)


Moments = tuple[int, Tensor, Tensor]


def _statistics(
    model: nn.Module, names: Sequence[str], groups: Sequence[Tensor]
) -> dict[str, Moments]:
    """Per module (count, mean, deviation) of its output's channels, in the order they first ran."""
    sums: dict[str, Moments] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            rows = output.detach().reshape(-1, output.shape[-1]).double()
            mean = rows.mean(0)
            new = (len(rows), mean, (rows - mean).square().sum(0))
            sums[name] = _joined(sums[name], new) if name in sums else new

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    training = model.training
    model.eval()
    own = processes.own_numbers([history.numel() for history in groups])
    try:
        with torch.no_grad(), processes.together():
            for number in own:
                model(groups[number])
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    sums = _of_all(sums, next(model.parameters()).device)
    lacking = [name for name in names if name not in sums]
    if lacking:
        raise InputError(f"module {lacking[0]!r} does not run when the model is called")
    return {name: (n, mean, (square / n).sqrt()) for name, (n, mean, square) in sums.items()}


def _of_all(sums: dict[str, Moments], device: torch.device) -> dict[str, Moments]:
    """Return the moments of all processes' groups together, joined in their order."""
    if processes.world() == 1:
        return sums
    told = {name: (n, mean.cpu(), square.cpu()) for name, (n, mean, square) in sums.items()}
    total: dict[str, Moments] = {}
    for found in processes.gathered(told):
        for name, (n, mean, square) in found.items():
            new = (n, mean.to(device), square.to(device))
            total[name] = _joined(total[name], new) if name in total else new
    return total


def _joined(one: Moments, other: Moments) -> Moments:
    """(count, mean, sum of squared differences from the mean) of two samples together."""
    (n, mean, square), (m, other_mean, other_square) = one, other
    gap = other_mean - mean
    total = n + m
    return total, mean + gap * m / total, square + other_square + gap.square() * (n * m / total)
