"""Lambda by gradient descent on the cross-entropy of validation data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fisherkern import processes
from fisherkern.adapters import ModelAdapter
from fisherkern.adapters.batches import sequence_lengths, shared_part
from fisherkern.errors import InputError
from fisherkern.members.checks import renamed
from fisherkern.members.ties import named_tensors
from fisherkern.merging.plan import MergePlan, Weights
from fisherkern.modes import eval_mode
from fisherkern.objectives.targets import check_columns


def learn_weights(
    plan: MergePlan, batches: Iterable[Any], *, steps: int
) -> tuple[Weights, list[dict[str, Any]]]:
    """Find lambda = softmax(a) with the lowest mean next-item cross-entropy.

        min over a, b of mean_n CE(exp(b) z_n(theta(softmax(a))), y_n)

    theta(lambda) is the method's average, with the Fishers where they are given, and is
    differentiated. The temperature exp(b) (option: "learned" or "fixed" at 1) is left out of the
    result: rankings do not depend on it. After the descent the equal mix, every member alone and
    what was learned are written as they would be returned and compared on all batches (with b as
    fitted to each). So the result is not worse there than the best member.

    Holds the members' aligned parameters once more (and their Fishers), in the parameters' own
    dtype. Several processes share each batch of the descent and deal out those of the comparison.

    Args:
        plan: The merge.
        batches: Batches with next items, native ones or as for `diag_fisher`.
        steps: Steps of Adam (option "lr") from a = 0, one batch each, around and around. a is one
            vector of M, or one per layer (all tensors of one module).

    Returns:
        lambda, and the candidates with their scores, minus the cross-entropy.

    Raises:
        InputError: There are no batches, or next items are missing or outside the catalogue.

    Source: Wortsman et al., arXiv 2203.05482, appendix on learned soups; layers as in AdaMerging,
    arXiv 2310.02575, with labels in place of entropy.
    """
    adapter = plan.adapter
    with (
        processes.together() as same,
        eval_mode(adapter.module),
        renamed("sampler 'target'", "validation"),
    ):
        prepared = [adapter.prepared(batch) for batch in batches]
        batches = [(batch, adapter.targets(batch)) for batch in prepared]
        if not batches:
            raise InputError("validation: it gave no batches")
        if processes.world() > 1:
            same["validation"] = [column.tolist() for _, column in batches]
    by_layer = plan.method.choose == "learned by layer"
    layers = list(dict.fromkeys(_layer(name, by_layer) for name in plan.blocks))
    number = len(plan.members)
    a = torch.zeros(len(layers), number, dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    mixture = _Mixture(plan)
    fitted = [a, b] if plan.options["temperature"] == "learned" else [a]
    optimizer = torch.optim.Adam(fitted, lr=plan.options["lr"])
    plan.write([1 / number] * number)
    network = _Network(adapter)
    with eval_mode(plan.module, gradients=True):
        for _, (inputs, column) in zip(range(steps), itertools.cycle(batches), strict=False):
            lam = dict(zip(layers, a.softmax(1), strict=True))
            with processes.together(), torch.enable_grad():
                tensors = mixture.tensors({n: lam[_layer(n, by_layer)] for n in plan.blocks})
                inner = {f"module.{name}": value for name, value in tensors.items()}
                part, places, weight = shared_part(inputs)
                logits = functional_call(network, inner, (part,))
                loss = weight * _cross_entropy(logits, column[places], b)
                optimizer.zero_grad()
                loss.backward(inputs=fitted)
            if not math.isfinite(processes.average_gradients_(fitted, loss)):
                raise InputError("validation: the cross-entropy of a batch is not finite")
            optimizer.step()
        rows = dict(zip(layers, a.detach().softmax(1).tolist(), strict=True))
        learned: Weights = {name: rows[_layer(name, by_layer)] for name in plan.blocks}
        if not by_layer:
            learned = rows[""]
        eye = torch.eye(number).tolist()
        points: list[Weights] = [[1 / number] * number, *eye, learned]
        free = plan.options["temperature"] == "learned"
        candidates: list[dict[str, Any]] = [
            {"weights": point, "score": -_lowest_cross_entropy(plan, point, batches, free)}
            for point in points
        ]
    weights: Weights = max(candidates, key=lambda candidate: candidate["score"])["weights"]
    if by_layer and isinstance(weights, list):
        weights = dict.fromkeys(plan.blocks, weights)
    return weights, candidates


class _Network(nn.Module):
    """A model's logits as the forward pass of a module, for `functional_call`."""

    def __init__(self, adapter: ModelAdapter) -> None:
        super().__init__()
        self.module = adapter.module
        self._logits = adapter.logits

    def forward(self, batch: Any) -> Tensor:
        return self._logits(batch)


def _layer(name: str, by_layer: bool) -> str:
    return name.rpartition(".")[0] or name if by_layer else ""


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
        new = named_tensors(self._plan.module)
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


def _cross_entropy(logits: Tensor, column: Tensor, b: Tensor) -> Tensor:
    """Return the mean cross-entropy of exp(b) * logits in float64."""
    return F.cross_entropy(check_columns(logits, column, "validation").double() * b.exp(), column)


@torch.no_grad()
def _lowest_cross_entropy(
    plan: MergePlan, weights: Weights, batches: Sequence[tuple[Any, Tensor]], free: bool
) -> float:
    """Return the mean cross-entropy over all batches of the model that `weights` give.

    `free`: at the temperature exp(b), b in [-3, 3], that makes it lowest. It is convex in exp(b).
    """
    from scipy.optimize import minimize_scalar

    plan.write(weights)
    own = processes.own_numbers([int(sequence_lengths(inputs).sum()) for inputs, _ in batches])
    with processes.together():
        logits = [
            (check_columns(plan.adapter.logits(inputs), column, "validation").double(), column)
            for inputs, column in (batches[number] for number in own)
        ]
    count = sum(len(column) for _, column in batches)

    def mean(b: float) -> float:
        scale = torch.tensor(b).double().exp()
        total = sum(float(F.cross_entropy(z * scale, y, reduction="sum")) for z, y in logits)
        return float(processes.joined_sum(torch.tensor([total]).double())) / count

    return (
        float(minimize_scalar(mean, bounds=(-3.0, 3.0), method="bounded").fun)
        if free
        else mean(0.0)
    )
