"""A merge method applied to aligned members, tensor by tensor, and written into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.fingerprint import fingerprint
from fisherkern.members.ties import named_tensors, write_tied
from fisherkern.merging.blocks import merge_tensor
from fisherkern.merging.member_set import MemberSet
from fisherkern.merging.rules import MergeMethod, average
from fisherkern.processes import world

# Lambda: M numbers, or M numbers for every tensor by name.
Weights = Sequence[float] | Mapping[str, Sequence[float]]


class MergePlan:
    """A method on members: writes the merge for any lambda into one and the same model."""

    def __init__(
        self,
        members: MemberSet,
        method: MergeMethod,
        options: Mapping[str, Any],
        floor: float,
        seed: int,
    ) -> None:
        self.members, self.method, self.options = members, method, options
        self.floor, self.seed = floor, seed
        self.function = method.with_options(options)
        self.blocks = {
            tie.name: members.blocks(tie, floor, seed)
            for tie in members.ties
            if tie.name not in members.fixed
        }
        self.stats: Mapping[str, Any] = {}
        if method.prepare is not None:
            merged = {tie.name: self.blocks[tie.name] for tie in members.merged}
            self.stats = method.prepare(merged, options)
        # What is written to, `target` as the members' user holds them.
        self.adapter, self.layout = members.new_model()
        self.module = self.adapter.module
        self.target: Any = self.adapter if members.adapted else self.adapter.source

    def merged(self, name: str, weights: Weights) -> Tensor:
        """Return one tensor: by the method if a parameter, by plain lambda if a buffer."""
        lam = weights[name] if isinstance(weights, Mapping) else weights
        if name not in self.members.parameters:
            return merge_tensor(average, self.blocks[name], lam)
        return merge_tensor(self.function, self.blocks[name], lam, self.stats.get(name))

    def report(self, weights: Weights, candidates: Sequence[Any]) -> dict[str, Any]:
        """Return what a merge report says of the plan and of the lambda chosen among candidates."""
        return {
            "method": self.method.name,
            "members": len(self.members),
            "weights": weights,
            "options": self.options,
            "floor": self.floor,
            "candidates": candidates,
            "items": self.members.catalogue.owners(),
            "coverage": self.members.coverage(self.floor),
            "averaged_buffers": self.members.averaged_buffers,
            "counters": self.members.counters,
        }

    def compared(self) -> dict[str, Any]:
        """Return what processes compare before they merge together: the equal mix, and how."""
        if world() == 1:
            return {}
        self.write([1 / len(self.members)] * len(self.members))
        how = {"method": self.method.name, "options": self.options, "seed": self.seed}
        return {"what is merged": fingerprint(self.module), **how}

    def write(self, weights: Weights, solved: Mapping[str, Tensor] | None = None) -> None:
        """Merge with `weights` into the target; tensors in `solved` are taken from there."""
        values = {**self.members.fixed, **(solved or {})}
        for name in self.blocks:
            if name not in values:
                values[name] = self.merged(name, weights)
        shapes = {name: tensor.shape for name, tensor in named_tensors(self.layout).items()}
        for name, value in values.items():
            if shapes.get(name) != value.shape:
                raise InputError(
                    f"tensor {name!r} is to have shape {tuple(value.shape)}, which the "
                    f"{type(self.module).__name__} built for the united catalogue does not provide"
                )
        write_tied(self.module, self.layout, self.members.ties, values)
