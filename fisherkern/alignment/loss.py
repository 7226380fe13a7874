"""Alignment by the loss of the members' average: what may be turned is turned until that is low."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fisherkern.alignment.assignment import complement_of_ones, fixing_ones
from fisherkern.encoders import SequenceEncoder
from fisherkern.encoders.symmetry import Symmetries
from fisherkern.errors import InputError
from fisherkern.members.fitting import minimize
from fisherkern.members.symmetries import Transforms, transform_model, transform_tensor
from fisherkern.modes import eval_mode
from fisherkern.objectives import Objective
from fisherkern.objectives.batch_loss import BatchLoss
from fisherkern.processes import average_gradients_

# The groups whose elements form a continuum; the others stay as the weights were matched.
CONTINUOUS = ("rotation", "orthogonal", "heads")
# Batches whose mean loss says whether turning was of use.
CHECKED = 32


class RotationParams:
    """For every continuous label a rotation exp(S - Sᵀ), in blocks, with S = 0 at the start.

    A "rotation" turns the complement of 1 alone, "heads" turn each head by itself.
    """

    def __init__(self, symmetries: Symmetries, like: Tensor) -> None:
        self.free: dict[str, Tensor] = {}
        self._complements: dict[str, Tensor] = {}
        for name, group in symmetries.groups.items():
            if group.kind not in CONTINUOUS:
                continue
            for label in symmetries.labels(name):
                size = group.size // group.heads
                if group.kind == "rotation":
                    self._complements[label] = complement_of_ones(group.size)
                    size -= 1
                self.free[label] = like.new_zeros(group.heads, size, size, requires_grad=True)

    def transforms(self, *, exact: bool = False) -> dict[str, Tensor]:
        """Orthogonal matrices by label; `exact`: in float64, without gradients."""
        found = {}
        for label, free in self.free.items():
            s = free.detach().double() if exact else free
            turn = torch.block_diag(*torch.linalg.matrix_exp(s - s.mT))
            if label in self._complements:
                turn = fixing_ones(turn, self._complements[label].to(turn))
            found[label] = turn
        return found


class _Average:
    """The mean of the members' parameters, as a function of their turns, and its loss."""

    def __init__(
        self, symmetries: Symmetries, members: Sequence[nn.Module], objective: Objective, seed: int
    ) -> None:
        """`members`: as the weights match them, the reference first."""
        self.symmetries, self.seed = symmetries, seed
        self.own = [dict(member.named_parameters()) for member in members]
        like = next(iter(self.own[0].values()))
        self.turns = [RotationParams(symmetries, like) for _ in members[1:]]
        self.loss = BatchLoss(cast(SequenceEncoder, copy.deepcopy(members[0])), objective, {}, {})
        self.generator = torch.Generator()

    def parameters(self) -> dict[str, Tensor]:
        transforms: list[Transforms] = [{}, *(turns.transforms() for turns in self.turns)]
        axes = self.symmetries.axes
        return {
            name: torch.stack(
                [
                    transform_tensor(own[name].detach(), axes[name], transform)
                    for own, transform in zip(self.own, transforms, strict=True)
                ]
            ).mean(0)
            for name in self.own[0]
        }

    def __call__(self, tokens: Any) -> Tensor:
        """Return the loss of a batch, or what has it for its mean over the processes."""
        tensors = {f"model.{name}": tensor for name, tensor in self.parameters().items()}
        loss: Tensor = functional_call(self.loss, tensors, (tokens, self.generator))[0]
        return loss

    @torch.no_grad()
    def over(self, batches: Sequence[Tensor]) -> float:
        """Return the mean loss of the first batches, with the same draws at every call."""
        self.generator.manual_seed(self.seed)
        first = batches[:CHECKED]
        return sum(average_gradients_([], self(batch)) for batch in first) / len(first)

    def learn(self, batches: Sequence[Tensor], *, steps: int, lr: float) -> list[float]:
        """Turn; `over` before and after."""
        before = self.over(batches)
        parameters = [free for turns in self.turns for free in turns.free.values()]
        if parameters:  # a member alone has nobody to meet
            minimize(parameters, batches, self, steps=steps, lr=lr, whole=True)
        after = self.over(batches)
        if after > before:  # the start is an answer too
            with torch.no_grad():
                for free in parameters:
                    free.zero_()
            after = before
        return [before, after]


def learn_rotations(
    members: Sequence[nn.Module],
    symmetries: Symmetries,
    matches: Sequence[Transforms],
    batches: Sequence[Any],
    objective: Any,
    *,
    reference: int,
    steps: int,
    lr: float,
    seed: int,
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Follow each of `matches` by rotations that make the average's loss low; and report.

    See `align`, by="loss". The reference, whose match is the identity, is not turned.
    """
    if not isinstance(objective, Objective):
        raise InputError(f"objective is a {type(objective).__name__}, not a loss like NextItem()")
    if objective.modules():
        raise InputError("objective has trainable parts of its own, which by='loss' does not train")
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() != 2 or batch.dtype != torch.int64:
            raise InputError("loader: by='loss' takes training windows, int64 tensors (N, T)")
    if steps < 0:
        raise InputError(f"steps is {steps} where a number of at least 0 was expected")
    if not 0 < lr < math.inf:
        raise InputError(f"lr is {lr} where a positive number was expected")
    if not any(group.kind in CONTINUOUS for group in symmetries.groups.values()):
        raise InputError("by='loss' turns channels, and these members admit permutations alone")
    order = [reference, *(n for n in range(len(members)) if n != reference)]
    near = [transform_model(members[number], symmetries, matches[number]) for number in order]
    average = _Average(symmetries, near, objective, seed)
    device = next(near[0].parameters()).device
    with eval_mode(average.loss, gradients=True):
        losses = average.learn([batch.to(device) for batch in batches], steps=steps, lr=lr)
    found = [dict(transforms) for transforms in matches]
    for number, turns in zip(order[1:], average.turns, strict=True):
        found[number] = _composed(matches[number], turns.transforms(exact=True))
    return found, {"steps": steps, "loss": losses}


def _composed(first: Transforms, second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the transforms that act as `first`, then as `second`, matrices."""
    found = dict(first)
    for label, turn in second.items():
        start = first.get(label)
        if start is not None and start.dim() == 1:
            start = torch.eye(len(start), device=start.device)[start]
        found[label] = turn if start is None else turn @ start.to(turn)
    return found
