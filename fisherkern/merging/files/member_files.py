"""The checked member files of a merge: common tensors, catalogues, and what is said of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from fisherkern.encoders import ENCODERS, SequenceEncoder, stored_encoder
from fisherkern.errors import InputError, shown
from fisherkern.files import read_json
from fisherkern.fingerprint import item_ids_sha256
from fisherkern.members.catalogue import CatalogueUnion, positions_of, union_item_ids
from fisherkern.members.checks import check_settings
from fisherkern.merging.files.native_settings import check_native_settings, match_item_rows
from fisherkern.merging.files.tensor_files import TensorFile

Layout = dict[str, tuple[str, tuple[int, ...]]]


class MemberFiles:
    """The members and the base: what they have in common, and where each keeps which row.

    parameters: names of what a rule merges, sorted: of a model of ours its parameters, else every
    floating tensor but running statistics. native: whether they are checkpoints of other libraries.
    known: whether the members are models of ours. layout, config, item_ids and ids_sha256 are the
    merged model's. ids_beside: what is written beside a native one. abouts: the JSON beside each
    member, without its item ids.
    """

    layout: Layout
    ids_beside: dict[str, Any] | None = None
    _base_catalogue: CatalogueUnion | None

    def __init__(
        self,
        files: Sequence[TensorFile],
        base: TensorFile | None,
        apart: Collection[str] = (),
    ) -> None:
        """`apart`: tensors that are merged elsewhere, in whatever shapes."""
        self.files, self.base = files, base
        self.everything = [*files, *([base] if base is not None else [])]
        models = [_model_of(file) for file in self.everything]
        first, model = files[0], models[0]
        self.known = model is not None
        own = None if model is None else {name for name, _ in model.named_parameters()}
        self.parameters = sorted(
            name for name in first.layout if first.floating(name) and (own is None or name in own)
        )
        rows = {} if model is None else model.item_parameters()
        self.sizes = [getattr(own, "num_items", 0) for own in models]
        self.abouts: list[dict[str, Any]] = []
        _check_same_kind(files, base)
        self.native = first.checkpoint is not None
        if self.native:
            self.parameters = [n for n in self.parameters if not first.is_buffer(n)]
            check_native_settings(self.everything)
            matched = match_item_rows(files, base)
            self.catalogue, self._base_catalogue = matched.catalogue, matched.base
            self.ids_beside = matched.beside
            united = self.catalogue.positions is not None or self._base_catalogue is not None
            moving = set(self.catalogue.parameters) if united else set()
            _check_alike(self.everything, moving, apart)
            self.abouts = [{} for _ in files]
            self.sizes = [*self.catalogue.sizes, 0]
            self.config = self.ids_sha256 = None
            self.layout = self._grown(self.catalogue.parameters)
            return
        _check_alike(self.everything, set(rows))
        self._read_catalogues(rows)
        self.layout = self._grown(rows)
        self.config = first.about.get("config")
        self.ids_sha256 = first.about.get("item_ids_sha256")
        if self.catalogue.positions is not None:
            ids = self.catalogue.item_ids or []
            self.config = {**dict(self.config or {}), "num_items": len(ids)}
            self.ids_sha256 = item_ids_sha256(ids)

    def _grown(self, tables: Collection[str]) -> Layout:
        """The first member's layout with a row for every item of the united catalogue."""
        layout = dict(self.files[0].layout)
        if self.catalogue.positions is not None:
            more = len(self.catalogue.item_ids or []) - self.sizes[0]
            for name in tables:
                kind, (length, *rest) = layout[name]
                layout[name] = kind, (length + more, *rest)
        return layout

    @property
    def item_ids(self) -> list[str] | None:
        """The merged model's item ids; None where there are none."""
        return self.catalogue.item_ids

    def rows(self, name: str) -> list[torch.Tensor] | None:
        """See `CatalogueUnion.rows`."""
        return self.catalogue.rows(name, [_length(file, name) for file in self.files])

    def base_rows(self, name: str) -> torch.Tensor | None:
        """The same of the base."""
        if self._base_catalogue is None or self.base is None:
            return None
        found = self._base_catalogue.rows(name, [_length(self.base, name)])
        return None if found is None else found[0]

    def identities(self) -> list[dict[str, Any]]:
        """Name, hash and metrics of each member, and the catalogue of a model of ours."""
        return [
            {
                **identity(file),
                "metrics": about.get("metrics", {}),
                **self._catalogue_of(file, size),
            }
            for file, about, size in zip(self.files, self.abouts, self.sizes, strict=False)
        ]

    def base_identity(self) -> dict[str, Any] | None:
        """The same of the base, without metrics; None without one."""
        if self.base is None:
            return None
        return {**identity(self.base), **self._catalogue_of(self.base, self.sizes[-1])}

    def catalogue_identity(self) -> dict[str, Any] | None:
        """The merged catalogue: items, hash of their ids, number of owners -> number of items."""
        if not self.known:
            return None
        owners = self.catalogue.owners()
        return {
            "items": sum(owners.values()),
            "item_ids_sha256": self.ids_sha256,
            "owners": owners,
        }

    def _catalogue_of(self, file: TensorFile, size: int) -> dict[str, Any]:
        if not self.known:
            return {}
        return {"items": size, "item_ids_sha256": file.about.get("item_ids_sha256")}

    def _read_catalogues(self, rows: dict[str, int]) -> None:
        """The united catalogue, and where the base keeps its items; reads each JSON once."""
        hashes = [file.about.get("item_ids_sha256") for file in self.everything]
        odd = next((h for h in hashes if not isinstance(h, str | None)), None)
        if odd is not None:
            path = self.everything[hashes.index(odd)].path
            raise InputError(f"{path}: its item_ids_sha256 is {shown(odd)}")
        members, sizes = hashes[: len(self.files)], self.sizes[: len(self.files)]
        self._base_catalogue = None
        ids: list[str] | None = None
        positions = None
        if None in hashes and len(set(hashes)) > 1:
            lacking = self.everything[hashes.index(None)]
            having = next(f for f, h in zip(self.everything, hashes, strict=True) if h is not None)
            raise InputError(
                f"{lacking.path}: has no item ids, so its item rows cannot be matched with those "
                f"of {having.path}"
            )
        if len(set(members)) > 1:
            ids, positions = union_item_ids(self._all_ids())
            _check_shared(self.files, ids, positions)
        else:
            for file in self.files:
                about, found = _read_about(file)
                self.abouts.append(about)
                ids = found if ids is None else ids
        self.catalogue = CatalogueUnion(ids, positions, sizes, rows)
        if self.base is not None and (len(set(members)) > 1 or hashes[-1] != members[0]):
            if ids is None:
                raise InputError(
                    f"{self.files[0].path.with_suffix('.json')}: no such file, which has the item "
                    f"ids that match the rows of {self.base.path}"
                )
            _, own = _read_about(self.base, self.sizes[-1])
            in_base = positions_of(ids, own or [], str(self.base.path.with_suffix(".json")))
            self._base_catalogue = CatalogueUnion(ids, [in_base], [self.sizes[-1]], rows)

    def _all_ids(self) -> Iterator[tuple[str, list[str]]]:
        """(File, item ids) of every member, one list at a time: they may be many."""
        for file, size in zip(self.files, self.sizes, strict=False):
            about, ids = _read_about(file, size)
            self.abouts.append(about)
            yield str(file.path.with_suffix(".json")), ids or []
            ids = None


def _check_shared(
    files: Sequence[TensorFile], ids: Sequence[str], positions: Sequence[torch.Tensor]
) -> None:
    """Refuse a member that has no item in common with any other: its ids are written otherwise."""
    counts = torch.stack([own >= 0 for own in positions]).sum(0)
    for file, own in zip(files, positions, strict=True):
        has = own >= 0
        if bool(has.any()) and bool((~has).any()) and int(counts[has].max()) == 1:
            example, other = (ids[int(kind.nonzero()[0])] for kind in (has, ~has))
            raise InputError(
                f"{file.path}: shares no item with the others: its ids are like {shown(example)}, "
                f"theirs like {shown(other)}; write them alike"
            )


def identity(file: TensorFile) -> dict[str, Any]:
    """Name and hash."""
    return {"file": file.path.name, "sha256": file.sha256()}


def _length(file: TensorFile, name: str) -> int:
    shape = file.layout[name][1]
    return shape[0] if shape else 1


def _model_of(file: TensorFile) -> SequenceEncoder | None:
    """An empty model of the file's class, whose tensors the file holds; None for another file."""
    name = file.about.get("class")
    if file.about.get("kind") != "model" or not isinstance(name, str) or name not in ENCODERS:
        return None
    shapes = {name: shape for name, (_, shape) in file.layout.items()}
    model = stored_encoder(file.path, name, file.about.get("config"), shapes)
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ file.layout.keys()):
        fault = "is missing" if name in expected else "is not part of the model"
        raise InputError(f"{file.path}: tensor {name!r} {fault}")
    for name, tensor in expected.items():
        if file.layout[name][1] != tuple(tensor.shape):
            raise InputError(
                f"{file.path}: tensor {name!r} has shape {file.layout[name][1]}, not "
                f"{tuple(tensor.shape)}"
            )
        if file.floating(name) != tensor.is_floating_point():
            raise InputError(f"{file.path}: tensor {name!r} is {file.layout[name][0]}")
    return model


def _check_same_kind(files: Sequence[TensorFile], base: TensorFile | None) -> None:
    """Members are of one kind, and tied alike; the base is ours or not as they are."""
    first = files[0]
    for other in files[1:]:
        if _kind(other) != _kind(first):
            raise InputError(
                f"{other.path}: is a {_kind(other)} file, and {first.path} a {_kind(first)} file"
            )
        for name in sorted(dict(first.aliases).items() ^ dict(other.aliases).items()):
            one, two = (first, other) if name in first.aliases.items() else (other, first)
            raise InputError(
                f"{one.path}: tensor {shown(name[0])} is tied to {shown(name[1])}, and "
                f"not in {two.path}"
            )
    if base is not None and (base.checkpoint is None) != (first.checkpoint is None):
        raise InputError(f"{base.path}: is a {_kind(base)} file, and {first.path} a {_kind(first)}")


def _kind(file: TensorFile) -> str:
    return str(file.about.get("kind")) if file.checkpoint is None else file.checkpoint.kind


def _check_alike(
    files: Sequence[TensorFile], item_tensors: set[str], apart: Collection[str] = ()
) -> None:
    """All files hold the same tensors, of one class and configuration; item rows may differ."""
    first = files[0]
    for other in files[1:]:
        for one, two in ((first, other), (other, first)):
            lacking = sorted(two.layout.keys() - one.layout.keys())
            if lacking:
                raise InputError(
                    f"{one.path}: tensor {lacking[0]!r} is missing, which {two.path} has"
                )
        if first.about.get("class") != other.about.get("class"):
            raise InputError(
                f"{other.path}: is a {other.about.get('class')} model, and {first.path} a "
                f"{first.about.get('class')}"
            )
        differ = first.about.get("item_ids_sha256") != other.about.get("item_ids_sha256")
        differ = differ or (first.checkpoint is not None and bool(item_tensors))
        if differ and not item_tensors:
            raise InputError(
                f"{other.path}: has other item ids than {first.path}, and of a "
                f"{first.about.get('class')} it is not known which rows are items'"
            )
        for name, (kind, shape) in first.layout.items():
            own_kind, own_shape = other.layout[name]
            if name in apart:
                continue
            moves = differ and name in item_tensors
            if own_shape[moves:] != shape[moves:]:
                raise InputError(
                    f"{other.path}: tensor {name!r} has shape {own_shape} and in {first.path} "
                    f"{shape}"
                )
            if own_kind != kind:
                raise InputError(
                    f"{other.path}: tensor {name!r} is {own_kind} and in {first.path} {kind}"
                )
    check_settings([file.about.get("config") for file in files])


def _read_about(
    file: TensorFile, size: int | None = None
) -> tuple[dict[str, Any], list[str] | None]:
    """(The JSON beside a model file without its item ids, the item ids); ({}, None) without one.

    With `size`, the item ids must be there, and be as many.
    """
    path = file.path.with_suffix(".json")
    if file.about.get("kind") != "model" or not path.is_file():
        if size is not None:
            raise InputError(f"{path}: no such file, which has the item ids of {file.path.name}")
        return {}, None
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    ids = content.pop("item_ids", None)
    metrics = content.get("metrics", {})
    numbers = isinstance(metrics, dict) and all(type(v) in (int, float) for v in metrics.values())
    if not numbers:
        raise InputError(f"{path}: its metrics are not numbers by name")
    if file.about.get("item_ids_sha256") != item_ids_sha256(ids):
        raise InputError(f"{path}: its item_ids are not those of {file.path.name}")
    if size is not None:
        if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
            raise InputError(f"{path}: its item_ids are not a list of strings")
        if len(ids) != size:
            raise InputError(f"{path} has {size} items but {len(ids)} item_ids")
    return content, ids
