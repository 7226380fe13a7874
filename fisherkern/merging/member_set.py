"""The checked and aligned members of a merge, and each tensor's blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.encoders.symmetry import whole
from fisherkern.errors import InputError
from fisherkern.members import checks
from fisherkern.members.catalogue import CatalogueUnion, align_item_rows, positions_of
from fisherkern.members.symmetries import symmetries_of
from fisherkern.members.ties import Tie, find_ties, named_tensors
from fisherkern.merging import checks as merge_checks
from fisherkern.merging.blocks import BlockIterator, agree
from fisherkern.merging.fishers import Fishers


class MemberSet:
    """The members and everything about a merge that depends neither on the method nor on lambda.

    `fixed` holds what no method touches: integer tensors and floating buffers that agree.
    """

    def __init__(
        self, models: Sequence[nn.Module], item_ids: Sequence[Sequence[str] | None] | None
    ) -> None:
        self.ties = checks.check_members(models)
        self.catalogue: CatalogueUnion = align_item_rows(models, item_ids)
        self.tensors = [named_tensors(model) for model in models]
        checks.check_tensors(self.tensors, self.ties, self.catalogue)
        checks.check_config(models)
        self.models = models
        self.parameters = {name for name, _ in models[0].named_parameters(remove_duplicate=False)}
        self.fishers: Fishers | None = None
        self.heads = attention_heads(models[0])
        self.grams: dict[str, list[Tensor]] = {}
        self._base: tuple[dict[str, Tensor], CatalogueUnion] | None = None
        # Integer tensors, and floating buffers the members agree on (masks may hold infinities).
        self.fixed: dict[str, Tensor] = {}
        for tie in self.ties:
            own = self.of(tie)
            if own[0].is_floating_point() and tie.name in self.parameters:
                checks.check_finite(own, tie.name)
                continue
            agreed, member = agree(own, self.rows(tie))
            if agreed is not None:
                self.fixed[tie.name] = agreed
            elif own[0].is_floating_point():
                checks.check_finite(own, tie.name)
            else:
                raise InputError(
                    f"tensor {tie.name!r} of member {member} differs from that of the members "
                    f"before it, and values of type {own[0].dtype} cannot be averaged"
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

    def use_base(self, base: nn.Module) -> None:
        """Check the model the members were trained from, and find its rows of their items."""
        pair = [self.models[0], base]
        with checks.renamed("member 1", "the base"):
            if checks.check_members(pair) != self.ties:
                raise InputError("member 1 is tied in other ways than the members")
        with checks.renamed("member 0", "the base"):
            align_item_rows([base], None)
        ids, own = self.catalogue.item_ids, getattr(base, "item_ids", None)
        if (ids is None) != (own is None):
            lacking, having = ("the base", "members") if own is None else ("member 0", "base")
            raise InputError(
                f"{lacking} has no item_ids, so its item rows cannot be matched with the {having}'s"
            )
        with checks.renamed("member 1", "the base"):
            if own is None:
                base_catalogue = align_item_rows(pair, None)
            else:
                base_catalogue = _catalogue_of_base(ids or [], list(own), self)
            tensors = named_tensors(base)
            checks.check_tensors([self.tensors[0], tensors], self.ties, base_catalogue)
            checks.check_config(pair)
            for tie in self.merged:
                checks.check_finite([self.tensors[0][tie.name], tensors[tie.name]], tie.name)
        self._base = tensors, base_catalogue

    def blocks(self, tie: Tie, floor: float, seed: int) -> BlockIterator:
        """The blocks of a parameter; of a buffer, without what methods know of parameters."""
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

    def new_model(self) -> tuple[Any, nn.Module]:
        """(The model to write to, the model whose ties it has).

        A copy of member 0, or a new model of its class for the united catalogue.
        """
        first, items = self.models[0], self.catalogue.item_ids
        target: Any
        layout = first
        # Member 0's items come first, so a union of the same size is its own catalogue.
        if items is None or len(items) == self.catalogue.sizes[0]:
            target = copy.deepcopy(first)
        else:
            target = layout = self._united_model(first, items)
        if items is not None:
            target.item_ids = list(items)
        return target, layout

    def _united_model(self, first: nn.Module, items: Sequence[str]) -> nn.Module:
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
        return target

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.models)

    def __len__(self) -> int:
        return len(self.models)


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
    ids: Sequence[str], own: Sequence[str], members: MemberSet
) -> CatalogueUnion:
    """Where the base, with items `own`, keeps the items `ids` of the merged model."""
    return CatalogueUnion(
        list(ids), [positions_of(ids, own, "the base")], [len(own)], members.catalogue.parameters
    )
