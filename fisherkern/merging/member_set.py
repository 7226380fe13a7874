"""The checked and aligned members of a merge, and each tensor's blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters import ModelAdapter
from fisherkern.encoders.symmetry import whole
from fisherkern.errors import InputError
from fisherkern.members import checks
from fisherkern.members.catalogue import CatalogueUnion, positions_of
from fisherkern.members.item_parts import align_rows, check_categories, united_tensors
from fisherkern.members.symmetries import symmetries_of
from fisherkern.members.ties import Tie, named_tensors
from fisherkern.merging import checks as merge_checks
from fisherkern.merging.blocks import BlockIterator, agree
from fisherkern.merging.fishers import Fishers, check_definitions
from fisherkern.merging.united import united_model


class MemberSet:
    """The members and everything about a merge that depends neither on the method nor on lambda.

    `fixed` holds what no method touches: integer tensors and floating buffers that agree.
    """

    def __init__(
        self, given: Sequence[Any], item_ids: Sequence[Sequence[str] | None] | None
    ) -> None:
        self.adapters = checks.adapters_of(given)
        self.adapted = isinstance(given[0], ModelAdapter)
        models = checks.bare_modules(given)
        self.ties = checks.check_members(models)
        self.catalogue: CatalogueUnion = align_rows(self.adapters, item_ids)
        self.tensors = united_tensors(models, self.catalogue)
        checks.check_tensors(self.tensors, self.ties, self.catalogue)
        checks.check_config(self.adapters)
        self.models = models
        self.parameters = {name for name, _ in models[0].named_parameters(remove_duplicate=False)}
        self.fishers: Fishers | None = None
        self.heads = attention_heads(models[0])
        self.grams: dict[str, list[Tensor]] = {}
        self._base: tuple[dict[str, Tensor], CatalogueUnion] | None = None
        # Integer tensors, and floating buffers the members agree on (masks may hold infinities).
        self.fixed: dict[str, Tensor] = {}
        # Counters of training that differ; member 0's is kept.
        self.counters: list[str] = []
        for tie in self.ties:
            own = self.of(tie)
            averages = checks.can_average(own[0])
            if averages and tie.name in self.parameters:
                checks.check_finite(own, tie.name)
                continue
            agreed, member = agree(own, self.rows(tie))
            counted = not averages and tie.name not in self.parameters
            if agreed is None and counted and checks.is_counter(tie.name, own[0].shape):
                agreed = own[0].detach().clone()
                self.counters.append(tie.name)
            if agreed is not None:
                self.fixed[tie.name] = agreed
            elif averages:
                checks.check_finite(own, tie.name)
            else:
                raise InputError(
                    f"tensor {tie.name!r} of member {member} differs from that of the members "
                    f"before it, and {_kind_of(own[0])} cannot be averaged"
                )

    @property
    def merged(self) -> list[Tie]:
        """The parameters that the method merges."""
        return [tie for tie in self.ties if tie.name in self.parameters - self.fixed.keys()]

    @property
    def averaged_buffers(self) -> list[str]:
        """Floating buffers that differ: averaged by lambda, whatever the method."""
        names = [tie.name for tie in self.ties]
        return [name for name in names if name not in self.parameters and name not in self.fixed]

    def use(
        self, inputs: Mapping[str, Any], normalize: str | None, check_fingerprint: bool
    ) -> None:
        """Check what `merge` was given beside the members, and merge by it."""
        if inputs["fishers"] is not None:
            self.use_fishers(inputs["fishers"], normalize, check_fingerprint)
        if inputs["base"] is not None:
            self.use_base(inputs["base"])
        if inputs["grams"] is not None:
            self.use_grams(inputs["grams"], check_fingerprint)
        if inputs["products"] is not None:
            merge_checks.check_products(self.models, inputs["products"], check_fingerprint)

    def use_fishers(
        self,
        fishers: Sequence[Mapping[str, Tensor]],
        normalize: str | None,
        check_fingerprint: bool,
    ) -> None:
        """Check the members' Fishers and merge by them."""
        fishers = merge_checks.check_mappings(fishers, "Fisher", "fishers", len(self.models))
        if check_fingerprint:
            merge_checks.check_fingerprints(self.models, fishers)
        given = [
            (f"the Fisher of member {i}", getattr(f, "meta", {})) for i, f in enumerate(fishers)
        ]
        check_definitions([(name, meta) for name, meta in given if isinstance(meta, Mapping)])
        checked = [
            merge_checks.check_fisher(fisher, tensors, self.merged, number)
            for number, (fisher, tensors) in enumerate(zip(fishers, self.tensors, strict=True))
        ]
        self.fishers = Fishers(checked, normalize)

    def use_grams(self, grams: Sequence[Mapping[str, Tensor]], check_fingerprint: bool) -> None:
        """Check the Gram matrices of the members' layer inputs and merge by them."""
        grams = merge_checks.check_mappings(grams, "Gram mapping", "grams", len(self.models))
        if check_fingerprint:
            merge_checks.check_fingerprints(self.models, grams, "Gram mapping")
        self.grams = merge_checks.check_grams(grams, self.tensors, self.merged)

    def use_base(self, given: Any) -> None:
        """Check the model the members were trained from, and find its rows of their items."""
        with checks.renamed("model:", "the base:"):
            adapter = ModelAdapter.of(given)
        base = adapter.module
        pair = [self.adapters[0], adapter]
        with checks.renamed("member 1", "the base"):
            if checks.check_members(pair) != self.ties:
                raise InputError("member 1 is tied in other ways than the members")
            check_categories([*self.adapters, adapter])
        with checks.renamed("member 0", "the base"):
            align_rows([adapter], None)
        ids, own = self.catalogue.item_ids, adapter.item_ids
        if (ids is None) != (own is None):
            lacking, having = ("the base", "members") if own is None else ("member 0", "base")
            raise InputError(
                f"{lacking} has no item_ids, so its item rows cannot be matched with the {having}'s"
            )
        with checks.renamed("member 1", "the base"):
            if own is None:
                base_catalogue = align_rows(pair, None)
            else:
                base_catalogue = _catalogue_of_base(ids or [], list(own), self, adapter)
            tensors = named_tensors(base)
            checks.check_tensors([self.tensors[0], tensors], self.ties, base_catalogue)
            checks.check_config(pair)
            for tie in self.merged:
                checks.check_finite([self.tensors[0][tie.name], tensors[tie.name]], tie.name)
        self._base = tensors, base_catalogue

    def blocks(self, tie: Tie, floor: float, seed: int) -> BlockIterator:
        """Return a parameter's blocks; a buffer's, without what methods know of parameters."""
        own, rows = [tensor.detach() for tensor in self.of(tie)], self.rows(tie)
        if tie.name not in self.parameters:
            return BlockIterator(tie.name, own, rows)
        base = base_rows = None
        if self._base is not None:
            tensors, base_catalogue = self._base
            base = tensors[tie.name].detach()
            found = base_catalogue.rows(tie.name, [len(base) if base.dim() else 1])
            base_rows = None if found is None else found[0]
        return BlockIterator(
            tie.name,
            own,
            rows,
            fishers=self.fishers.scaled(tie.name) if self.fishers else None,
            base=base,
            base_rows=base_rows,
            grams=self.grams.get(tie.name),
            heads=self.heads.get(tie.name),
            floor=floor,
            seed=seed,
        )

    def coverage(self, floor: float) -> dict[str, list[float]]:
        """See `Fishers.coverage`; {} for methods without a Fisher."""
        if self.fishers is None:
            return {}
        return self.fishers.coverage([tie.name for tie in self.merged], floor)

    def of(self, tie: Tie) -> list[Tensor]:
        """Every member's tensor."""
        return [tensors[tie.name] for tensors in self.tensors]

    def rows(self, tie: Tie) -> list[Tensor] | None:
        """See `CatalogueUnion.rows`."""
        lengths = [len(tensor) if tensor.dim() else 1 for tensor in self.of(tie)]
        return self.catalogue.rows(tie.name, lengths)

    def new_model(self) -> tuple[ModelAdapter, nn.Module]:
        """Return (the model to write to, the module whose ties it has).

        A copy of member 0, or a new model of its kind for the united catalogue.
        """
        first, items = self.adapters[0], self.catalogue.item_ids
        # Member 0's items come first, so a union of the same size is its own catalogue.
        same = items is None or len(items) == self.catalogue.sizes[0]
        settings = first.settings or {}
        if same and all(settings[key] == own for key, own in self.catalogue.config.items()):
            target, layout = first.copy(), first.module
        else:
            target = united_model(first, self.catalogue, self.ties)
            layout = target.module
        if items is not None:
            target.module.item_ids = list(items)  # type: ignore[assignment]  # no tensor
        return target, layout

    def __len__(self) -> int:
        return len(self.models)


def _kind_of(tensor: Tensor) -> str:
    if tensor.layout != torch.strided:
        return "sparse values"
    return f"values of type {tensor.dtype}"


def attention_heads(model: nn.Module) -> dict[str, tuple[str, int, int]]:
    """Parameter -> (attention, number of heads, dimension), where the symmetries say so."""
    try:
        symmetries = symmetries_of(model)
    except InputError:
        return {}
    found = {}
    for attention, group in symmetries.groups.items():
        if group.kind != "heads":
            continue
        labels = symmetries.labels(attention)
        for name, axes in symmetries.axes.items():
            names = axes[0].labels
            dims = [names.index(label) for label in labels if label in names]
            if dims and axes == whole(*names):
                found[name] = attention, group.heads, dims[0]
    return found


def _catalogue_of_base(
    ids: Sequence[str], own: Sequence[str], members: MemberSet, base: ModelAdapter
) -> CatalogueUnion:
    """Where the base, with items `own`, keeps the items `ids` of the merged model."""
    tables = members.catalogue.parameters or base.item_parameters
    return CatalogueUnion(list(ids), [positions_of(ids, own, "the base")], [len(own)], tables)
