"""merge(): one model out of several of the same class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fisherkern.errors import InputError
from fisherkern.merging import checks
from fisherkern.merging.blocks import agree, merge_tensor
from fisherkern.merging.fishers import Fishers
from fisherkern.merging.rows import Catalogue, align
from fisherkern.merging.rules import Rule, average
from fisherkern.merging.search import search_weights
from fisherkern.merging.ties import Tie, find_ties, named_tensors, write_tied

ModelT = TypeVar("ModelT", bound=nn.Module)


def merge(
    models: Sequence[ModelT],
    *,
    method: str | None = None,
    weights: Sequence[float] | Tensor | str | None = None,
    fishers: Sequence[Mapping[str, Tensor]] | None = None,
    floor: float = 0.1,
    normalize: str | None = "mean",
    score: Callable[[ModelT], float] | None = None,
    item_ids: Sequence[Sequence[str] | None] | None = None,
    check_fingerprint: bool = True,
    steps: int = 20,
    seed: int = 0,
) -> ModelT:
    """A new model of the members' class, with for every entry of every parameter

        theta* = sum_m lambda_m f_m theta_m / sum_m lambda_m f_m,   f_m = F_m/mean(F_m) + floor

    models: M modules of one class with the same tensors. They are left as they are.
    method: "uniform" (lambda_m = 1/M, no Fisher), "weighted" (lambda, no Fisher) or "fisher";
        by default what the arguments given imply.
    weights: lambda, M numbers >= 0 of which the sum does not matter; "search" looks for those
        with the highest `score` (see `search_weights`); None means equal.
    fishers: M mappings from names of `named_parameters()` to non-negative tensors of the
        parameters' shapes. mean(F_m) is over all entries of the member's Fisher, so a Fisher
        scaled by a constant changes nothing. A `.meta["fingerprint"]` must fit the member,
        unless check_fingerprint=False.
    floor: the weight of the plain lambda-average, relative to the mean Fisher entry.
    normalize: "mean" as above; None divides every F_m by the mean over all members instead, so
        that a member with a larger Fisher counts more.
    score: model -> float, higher is better, to be measured on validation data. It is handed one
        and the same model with other values each time.
    item_ids: external ids of each member's items, for models without an `item_ids` attribute.
    steps, seed: number and seed of the random draws of the search.

    What Fisher cannot decide is averaged by lambda: entries where every member's Fisher is zero,
    tensors for which it is rounding noise (largest entry below 1e-10 of the model's mean, as in
    attention's key biases), tensors that a member's Fisher lacks because they are frozen, and
    floating buffers that differ. Integer and boolean tensors must agree. Tensors sharing memory
    are merged once, with the Fisher of the one that holds the others, and share memory in the
    result. Computed in float64 and cast back.

    Members with different `item_ids` are aligned by id: the result, built as
    `type(m)(**{**m.config, "num_items": V})`, has the union of the catalogues. An item's rows
    are merged among its owners (even if all of those have lambda 0), padding and mask rows among
    all members.

    The result carries `merge_report`, a JSON-ready dict: method, members, weights, floor,
    normalize, candidates (weights and score of each tried), items (number of owners -> number
    of items), coverage (tensor -> per member, share of entries whose Fisher exceeds the floor),
    averaged_buffers.

    Allocates the new model and one merged copy of its tensors; the float64 work is done in
    blocks of some 65,000 entries. Raises InputError, naming the member, tensor or argument, for
    anything that does not fit.
    Source: Matena and Raffel, arXiv 2111.09832, for lambda and F; arXiv 2307.05476 for
    recommenders; the relative floor and the units are ours.
    """
    models = list(models)
    name, rule = checks.choose_rule(method, weights, fishers, score, floor, normalize)
    merger = _Merger(models, rule, floor, item_ids)
    if fishers is not None:
        merger.use_fishers(fishers, normalize, check_fingerprint)
    target = merger.new_model()
    candidates: list[dict[str, Any]] = []
    if score is not None:

        def score_of(point: list[float]) -> float:
            merger.write(target, point)
            return score(target)

        chosen, candidates = search_weights(score_of, len(models), steps=steps, seed=seed)
    else:
        chosen = checks.check_weights(None if isinstance(weights, str) else weights, len(models))
    averaged = merger.write(target, chosen)
    report: dict[str, Any] = {
        "method": name,
        "members": len(models),
        "weights": chosen,
        "floor": floor,
        "normalize": normalize,
        "candidates": candidates,
        "items": merger.catalogue.owners(),
        "coverage": merger.coverage(),
        "averaged_buffers": averaged,
    }
    target.merge_report = report
    return target


class _Merger:
    """The checked members and everything about a merge that does not depend on lambda."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        rule: Rule,
        floor: float,
        item_ids: Sequence[Sequence[str] | None] | None,
    ) -> None:
        self.ties = checks.check_members(models)
        self.catalogue: Catalogue = align(models, item_ids)
        self.tensors = [named_tensors(model) for model in models]
        checks.check_tensors(self.tensors, self.ties, self.catalogue)
        checks.check_config(models)
        self.models, self.rule, self.floor = models, rule, floor
        self.parameters = {name for name, _ in models[0].named_parameters(remove_duplicate=False)}
        self.fishers: Fishers | None = None
        # Integer tensors, and floating buffers the members agree on (masks may hold infinities).
        self.fixed: dict[str, Tensor] = {}
        for tie in self.ties:
            own = [tensors[tie.name] for tensors in self.tensors]
            if own[0].is_floating_point() and tie.name in self.parameters:
                checks.check_finite(own, tie.name)
                continue
            agreed, member = agree(own, self._rows(tie))
            if agreed is not None:
                self.fixed[tie.name] = agreed
            elif own[0].is_floating_point():
                checks.check_finite(own, tie.name)
            else:
                raise InputError(
                    f"tensor {tie.name!r} of member {member} differs from that of the members "
                    f"before it, and values of type {own[0].dtype} cannot be averaged"
                )

    def use_fishers(
        self,
        fishers: Sequence[Mapping[str, Tensor]],
        normalize: str | None,
        check_fingerprint: bool,
    ) -> None:
        """Check the members' Fishers and merge by them."""
        fishers = list(fishers)
        if len(fishers) != len(self.models):
            raise InputError(f"there are {len(fishers)} fishers for {len(self.models)} members")
        for number, fisher in enumerate(fishers):
            if not isinstance(fisher, Mapping):
                raise InputError(
                    f"the Fisher of member {number} is a {type(fisher).__name__}, not a mapping "
                    "from names to tensors"
                )
        if check_fingerprint:
            checks.check_fingerprints(self.models, fishers)
        merged = [tie for tie in self.ties if tie.name in self.parameters - self.fixed.keys()]
        checked = [
            checks.check_fisher(fisher, tensors, merged, number)
            for number, (fisher, tensors) in enumerate(zip(fishers, self.tensors, strict=True))
        ]
        self.fishers = Fishers(checked, normalize)

    def new_model(self) -> Any:
        """The model to write to: a copy of member 0, or a new one for the united catalogue."""
        first, items = self.models[0], self.catalogue.item_ids
        target: Any
        # Member 0's items come first, so a union of the same size is its own catalogue.
        if items is None or len(items) == self.catalogue.sizes[0]:
            self.layout = first
            target = copy.deepcopy(first)
        else:
            config = getattr(first, "config", None)
            if not isinstance(config, dict) or "num_items" not in config:
                raise InputError(
                    f"the members' catalogues differ, and {type(first).__name__} has no config "
                    "with num_items to build a model for their union from"
                )
            with torch.random.fork_rng(devices=[]):
                target = type(first)(**{**config, "num_items": len(items)})
            target.train(first.training)
            frozen = {name for name, p in first.named_parameters() if not p.requires_grad}
            for name, parameter in target.named_parameters():
                parameter.requires_grad_(name not in frozen and parameter.requires_grad)
            if find_ties(target, "the model for the united catalogue") != self.ties:
                raise InputError(
                    f"{type(first).__name__}(**config) does not build a model with the tensors "
                    "and ties of the members, so their catalogues cannot be united"
                )
            self.layout = target
        if items is not None:
            target.item_ids = list(items)
        return target

    def write(self, target: nn.Module, weights: Sequence[float]) -> list[str]:
        """Merge with `weights` into `target`; the names of the buffers that were averaged."""
        values = dict(self.fixed)
        averaged = []
        for tie in self.ties:
            if tie.name in self.fixed:
                continue
            if tie.name not in self.parameters:
                averaged.append(tie.name)
            values[tie.name] = self._merge(tie, weights)
        shapes = {name: tensor.shape for name, tensor in named_tensors(self.layout).items()}
        for name, value in values.items():
            if shapes.get(name) != value.shape:
                raise InputError(
                    f"tensor {name!r} is to have shape {tuple(value.shape)}, which the "
                    f"{type(target).__name__} built for the united catalogue does not provide"
                )
        write_tied(target, self.layout, self.ties, values)
        return averaged

    def coverage(self) -> dict[str, list[float]]:
        """See `Fishers.coverage`; {} for rules without a Fisher."""
        if self.fishers is None:
            return {}
        names = [tie.name for tie in self.ties if tie.name in self.parameters - self.fixed.keys()]
        return self.fishers.coverage(names, self.floor)

    def _rows(self, tie: Tie) -> list[Tensor] | None:
        tensors = [own[tie.name] for own in self.tensors]
        return self.catalogue.rows(tie.name, [len(t) if t.dim() else 1 for t in tensors])

    def _merge(self, tie: Tie, weights: Sequence[float]) -> Tensor:
        """One tensor merged: by the rule if a parameter, by plain lambda if a buffer."""
        own = [tensors[tie.name].detach() for tensors in self.tensors]
        is_parameter = tie.name in self.parameters
        fishers = self.fishers.scaled(tie.name) if self.fishers and is_parameter else None
        function = self.rule.function if is_parameter else average
        return merge_tensor(function, own, weights, fishers, self._rows(tie), self.floor)
