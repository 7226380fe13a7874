"""Lambda by gradient descent on the cross-entropy of validation data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from fisherkern.errors import InputError
from fisherkern.members.ties import named_tensors
from fisherkern.merging.plan import MergePlan, Weights


def learn_weights(
    plan: MergePlan, batches: Iterable[Any], *, steps: int
) -> tuple[Weights, list[dict[str, Any]]]:
    """Lambda = softmax(a) minimising the mean next-item cross-entropy, and the candidates.

        min over a, b of mean_n CE(exp(b) z_n(theta(softmax(a))), y_n)

    `steps` steps of Adam (option "lr") from a = 0, one batch each, around and around; a is one
    vector of M, or one per layer (all tensors of one module). theta(lambda) is the method's
    average, with the Fishers where they are given, and is differentiated. The temperature
    exp(b) (option: "learned" or "fixed" at 1) is left out of the result: rankings do not
    depend on it.

    Then the equal mix, every member alone and what was learned are written as they would be
    returned and compared on all batches; the one of lowest cross-entropy is returned (with b as
    fitted to that candidate), so the result is not worse there than the best member.

    Holds the members' aligned parameters once more (and their Fishers), in the parameters' own
    dtype. Source: Wortsman et al., arXiv 2203.05482, appendix on learned soups; layers as in
    AdaMerging, arXiv 2310.02575, with labels in place of entropy.
    """
    batches = [_history_and_target(batch, plan.target) for batch in batches]
    if not batches:
        raise InputError("validation: it gave no batches")
    by_layer = plan.method.choose == "learned by layer"
    layers = list(dict.fromkeys(_layer(name, by_layer) for name in plan.blocks))
    number = len(plan.members)
    a = torch.zeros(len(layers), number, dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    mixture = _Mixture(plan)
    fitted = [a, b] if plan.options["temperature"] == "learned" else [a]
    optimizer = torch.optim.Adam(fitted, lr=plan.options["lr"])
    training = [(module, module.training) for module in plan.target.modules()]
    plan.write([1 / number] * number)
    plan.target.eval()
    try:
        for _, (history, target) in zip(range(steps), itertools.cycle(batches), strict=False):
            lam = dict(zip(layers, a.softmax(1), strict=True))
            with torch.enable_grad():
                tensors = mixture.tensors({n: lam[_layer(n, by_layer)] for n in plan.blocks})
                logits = functional_call(plan.target, tensors, (history,))
                loss = F.cross_entropy(_known(logits, target).double() * b.exp(), target)
            if not torch.isfinite(loss):
                raise InputError("validation: the cross-entropy of a batch is not finite")
            optimizer.zero_grad()
            loss.backward(inputs=fitted)
            optimizer.step()
        rows = dict(zip(layers, a.detach().softmax(1).tolist(), strict=True))
        learned: Weights = {name: rows[_layer(name, by_layer)] for name in plan.blocks}
        if not by_layer:
            learned = rows[""]
        eye = torch.eye(number).tolist()
        points: list[Weights] = [[1 / number] * number, *eye, learned]
        free = plan.options["temperature"] == "learned"
        candidates: list[dict[str, Any]] = [
            {"weights": point, "score": -_cross_entropy(plan, point, batches, free)}
            for point in points
        ]
    finally:
        for module, mode in training:
            module.training = mode
    weights: Weights = max(candidates, key=lambda candidate: candidate["score"])["weights"]
    if by_layer and isinstance(weights, list):
        weights = dict.fromkeys(plan.blocks, weights)
    return weights, candidates


def _layer(name: str, by_layer: bool) -> str:
    return name.rpartition(".")[0] or name if by_layer else ""


def _history_and_target(batch: Any, model: Any) -> tuple[Any, Tensor]:
    """The model's input and the columns (N,) of the next items among its logits."""
    if isinstance(batch, Mapping) and "target" in batch:
        history, target = batch, batch["target"]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        history, target = batch
    else:
        raise InputError(
            "validation: a batch holds no next items; give mappings with 'history' and 'target', "
            "or (history, target) pairs"
        )
    return history, torch.as_tensor(target).long() - int(getattr(model, "first_item", 0))


def _known(logits: Tensor, target: Tensor) -> Tensor:
    """`logits` (N, V), after checking that the targets are among its columns."""
    if len(target) and (int(target.min()) < 0 or int(target.max()) >= logits.shape[1]):
        raise InputError("validation: a batch's next items are outside the catalogue")
    return logits


class _Mixture:
    """theta(lambda) of every parameter as a differentiable function."""

    def __init__(self, plan: MergePlan) -> None:
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}
        self._plan = plan
        for tie in plan.members.merged:
            blocks = plan.blocks[tie.name]
            theta, share = [], []
            for x in blocks:
                own = x.owns.expand_as(x.theta).double()
                useful = own if x.fisher is None else own * (x.fisher + x.floor)
                theta.append(x.theta)
                share.append(torch.where(useful.sum(0) > 0, useful, own))
            if theta:
                dtype = blocks.tensors[0].dtype
                dtype = torch.promote_types(dtype, torch.float32)
                self._parts[tie.name] = (
                    torch.cat(theta, 1).to(dtype),
                    torch.cat(share, 1).to(dtype),
                )

    def tensors(self, lam: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> tensor of the target, tied names included."""
        found = {}
        old = named_tensors(self._plan.layout)
        new = named_tensors(self._plan.target)
        for tie in self._plan.members.merged:
            if tie.name not in self._parts:
                continue
            theta, share = self._parts[tie.name]
            weighted = share * lam[tie.name].to(share)[:, None, None]
            value = (weighted * theta).sum(0) / weighted.sum(0)
            value = value.reshape(self._plan.blocks[tie.name].shape).to(old[tie.name].dtype)
            found[tie.name] = value
            for alias in tie.aliases:
                # One parameter under two names is set under the first.
                if new[alias] is not new[tie.name]:
                    found[alias] = _view(value, old[tie.name], old[alias])
        return found


def _view(value: Tensor, owner: Tensor, alias: Tensor) -> Tensor:
    """`value` seen as `alias` sees the memory of `owner`, differentiably."""
    place = torch.arange(value.numel(), device=value.device)
    home = torch.empty_strided(
        owner.size(), owner.stride(), dtype=torch.int64, device=value.device
    ).copy_(place.view(value.shape))
    start = alias.storage_offset() - owner.storage_offset()
    return value.flatten()[home.as_strided(alias.size(), alias.stride(), start)]


@torch.no_grad()
def _cross_entropy(
    plan: MergePlan, weights: Weights, batches: Sequence[tuple[Any, Tensor]], free: bool
) -> float:
    """Mean cross-entropy over all batches of the model that `weights` give.

    `free`: at the temperature that makes it lowest, found by golden section on b in [-3, 3].
    """
    plan.write(weights)
    logits = [_known(plan.target(history), target).double() for history, target in batches]
    count = sum(len(target) for _, target in batches)

    def mean(b: float) -> float:
        scale = torch.tensor(b).double().exp()
        total = sum(
            float(F.cross_entropy(z * scale, target, reduction="sum"))
            for z, (_, target) in zip(logits, batches, strict=True)
        )
        return total / count

    return _golden_section(mean, -3.0, 3.0) if free else mean(0.0)


def _golden_section(function: Any, low: float, high: float) -> float:
    """The least value of a unimodal function (the cross-entropy is convex in exp(b))."""
    ratio = (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(20):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return min(at_left, at_right)
