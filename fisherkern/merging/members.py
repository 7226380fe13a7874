"""The checked and aligned members of a merge, and each tensor's blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.errors import InputError
from fisherkern.merging import checks
from fisherkern.merging.blocks import TensorBlocks, agree
from fisherkern.merging.fishers import Fishers
from fisherkern.merging.rows import Catalogue, align, positions_of
from fisherkern.merging.symmetries import Piece, symmetries_of
from fisherkern.merging.ties import Tie, find_ties, named_tensors


class Members:
    """The members and everything about a merge that depends neither on the rule nor on lambda.

    `fixed` holds what no rule touches: integer tensors and floating buffers that agree.
    """

    def __init__(
        self, models: Sequence[nn.Module], item_ids: Sequence[Sequence[str] | None] | None
    ) -> None:
        self.ties = checks.check_members(models)
        self.catalogue: Catalogue = align(models, item_ids)
        self.tensors = [named_tensors(model) for model in models]
        checks.check_tensors(self.tensors, self.ties, self.catalogue)
        checks.check_config(models)
        self.models = models
        self.parameters = {name for name, _ in models[0].named_parameters(remove_duplicate=False)}
        self.fishers: Fishers | None = None
        self.heads = attention_heads(models[0])
        self.grams: dict[str, list[Tensor]] = {}
        self._base: tuple[dict[str, Tensor], Catalogue] | None = None
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
        """The parameters that the rule merges."""
        return [tie for tie in self.ties if tie.name in self.parameters - self.fixed.keys()]

    @property
    def averaged_buffers(self) -> list[str]:
        """Floating buffers that differ: averaged by lambda, whatever the rule."""
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
            checks.check_products(self.models, inputs["products"], check_fingerprint)

    def use_fishers(
        self,
        fishers: Sequence[Mapping[str, Tensor]],
        normalize: str | None,
        check_fingerprint: bool,
    ) -> None:
        """Check the members' Fishers and merge by them."""
        fishers = checks.check_mappings(fishers, "Fisher", "fishers", len(self.models))
        if check_fingerprint:
            checks.check_fingerprints(self.models, fishers)
        checked = [
            checks.check_fisher(fisher, tensors, self.merged, number)
            for number, (fisher, tensors) in enumerate(zip(fishers, self.tensors, strict=True))
        ]
        self.fishers = Fishers(checked, normalize)

    def use_grams(self, grams: Sequence[Mapping[str, Tensor]], check_fingerprint: bool) -> None:
        """Check the Gram matrices of the members' layer inputs and merge by them."""
        grams = checks.check_mappings(grams, "Gram mapping", "grams", len(self.models))
        if check_fingerprint:
            checks.check_fingerprints(self.models, grams, "Gram mapping")
        self.grams = checks.check_grams(grams, self.tensors, self.merged)

    def use_base(self, base: nn.Module) -> None:
        """Check the model the members were trained from, and find its rows of their items."""
        pair = [self.models[0], base]
        with checks.renamed("member 1", "the base"):
            if checks.check_members(pair) != self.ties:
                raise InputError("member 1 is tied in other ways than the members")
        with checks.renamed("member 0", "the base"):
            align([base], None)
        ids, own = self.catalogue.item_ids, getattr(base, "item_ids", None)
        if (ids is None) != (own is None):
            lacking, having = ("the base", "members") if own is None else ("member 0", "base")
            raise InputError(
                f"{lacking} has no item_ids, so its item rows cannot be matched with the {having}'s"
            )
        with checks.renamed("member 1", "the base"):
            place = align(pair, None) if own is None else _place(ids or [], list(own), self)
            tensors = named_tensors(base)
            checks.check_tensors([self.tensors[0], tensors], self.ties, place)
            checks.check_config(pair)
            for tie in self.merged:
                checks.check_finite([self.tensors[0][tie.name], tensors[tie.name]], tie.name)
        self._base = tensors, place

    def blocks(self, tie: Tie, floor: float, options: Mapping[str, Any], seed: int) -> TensorBlocks:
        """The blocks of a parameter; of a buffer, without what rules know of parameters."""
        own, rows = [tensor.detach() for tensor in self.of(tie)], self.rows(tie)
        if tie.name not in self.parameters:
            return TensorBlocks(tie.name, own, rows)
        base = base_rows = None
        if self._base is not None:
            tensors, place = self._base
            base = tensors[tie.name].detach()
            found = place.rows(tie.name, [len(base) if base.dim() else 1])
            base_rows = None if found is None else found[0]
        return TensorBlocks(
            tie.name,
            own,
            rows,
            fishers=self.fishers.scaled(tie.name) if self.fishers else None,
            base=base,
            base_rows=base_rows,
            grams=self.grams.get(tie.name),
            heads=self.heads.get(tie.name),
            floor=floor,
            options=options,
            seed=seed,
        )

    def coverage(self, floor: float) -> dict[str, list[float]]:
        """See `Fishers.coverage`; {} for rules without a Fisher."""
        if self.fishers is None:
            return {}
        return self.fishers.coverage([tie.name for tie in self.merged], floor)

    def of(self, tie: Tie) -> list[Tensor]:
        """Every member's tensor."""
        return [tensors[tie.name] for tensors in self.tensors]

    def rows(self, tie: Tie) -> list[Tensor] | None:
        """See `Catalogue.rows`."""
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
        for name, pieces in symmetries.pieces.items():
            dims = [pieces[0].labels.index(label) for label in labels if label in pieces[0].labels]
            if dims and len(pieces) == 1 and pieces[0] == Piece(pieces[0].labels):
                found[name] = attention, group.heads, dims[0]
    return found


def _place(ids: Sequence[str], own: Sequence[str], members: Members) -> Catalogue:
    """Where the base, with items `own`, keeps the items `ids` of the merged model."""
    return Catalogue(
        list(ids), [positions_of(ids, own, "the base")], [len(own)], members.catalogue.parameters
    )
