"""The checked member files of a merge: common tensors, catalogues, and what is said of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fisherkern.encoders import ENCODERS, SequenceEncoder, stored_encoder
from fisherkern.errors import InputError, shown
from fisherkern.members.catalogue import CatalogueUnion, ItemRows, owner_counts
from fisherkern.members.checks import check_settings
from fisherkern.merging.files.item_ids import ItemIdFile, ItemNumbers, MergedIds, inverse
from fisherkern.merging.files.native_settings import check_native_settings, match_item_rows
from fisherkern.merging.files.tensor_files import TensorFile

Layout = dict[str, tuple[str, tuple[int, ...]]]
#: In the place of a hash that is known only when all has been read; as long as that.
UNKNOWN = "0" * 64


class MemberFiles:
    """The members and the base: what they have in common, and where each keeps which row.

    parameters: names of what a rule merges, sorted: of a model of ours its parameters, else every
    floating tensor but running statistics. native: whether they are checkpoints of other libraries.
    known: whether the members are models of ours. layout, config, item_ids (None without any, and
    in native checkpoints) and ids_sha256 are the merged model's. ids_beside: what is written beside
    a native one. abouts: the JSON beside each member, without its item ids.
    """

    layout: Layout
    ids_beside: dict[str, Any] | None = None
    item_ids: MergedIds | None = None
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
        if self.catalogue.positions is not None and self.item_ids is not None:
            self.config = {**dict(self.config or {}), "num_items": len(self.catalogue.positions[0])}
            self.ids_sha256 = self.item_ids.sha256()

    def _grown(self, tables: Collection[str]) -> Layout:
        """Return the first member's layout with a row for every item of the united catalogue."""
        layout = dict(self.files[0].layout)
        if self.catalogue.positions is not None:
            more = len(self.catalogue.positions[0]) - self.sizes[0]
            for name in tables:
                kind, (length, *rest) = layout[name]
                layout[name] = kind, (length + more, *rest)
        return layout

    def rows(self, name: str) -> list[ItemRows] | None:
        """See `CatalogueUnion.row_maps`."""
        return self.catalogue.row_maps(name, [_length(file, name) for file in self.files])

    def base_rows(self, name: str) -> ItemRows | None:
        """Return the same of the base."""
        if self._base_catalogue is None or self.base is None:
            return None
        found = self._base_catalogue.row_maps(name, [_length(self.base, name)])
        return None if found is None else found[0]

    def identities(self, hashes: Mapping[Path, str]) -> list[dict[str, Any]]:
        """Name, hash (by path) and metrics of each member, and of ours their items."""
        return [
            {
                **_identity(file, hashes),
                "metrics": about.get("metrics", {}),
                **self._catalogue_of(file, size),
            }
            for file, about, size in zip(self.files, self.abouts, self.sizes, strict=False)
        ]

    def base_identity(self, hashes: Mapping[Path, str]) -> dict[str, Any] | None:
        """Return the same of the base, without metrics; None without one."""
        if self.base is None:
            return None
        return {**_identity(self.base, hashes), **self._catalogue_of(self.base, self.sizes[-1])}

    def catalogue_identity(self) -> dict[str, Any] | None:
        """Return the merged catalogue: items, hash of the ids, items by their number of owners."""
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
        """Read the united catalogue, and where the base keeps its items; each JSON once."""
        hashes = [file.about.get("item_ids_sha256") for file in self.everything]
        odd = next((h for h in hashes if not isinstance(h, str | None)), None)
        if odd is not None:
            path = self.everything[hashes.index(odd)].path
            raise InputError(f"{path}: its item_ids_sha256 is {shown(odd)}")
        sizes = self.sizes[: len(self.files)]
        if None in hashes and len(set(hashes)) > 1:
            lacking = self.everything[hashes.index(None)]
            having = next(f for f, h in zip(self.everything, hashes, strict=True) if h is not None)
            raise InputError(
                f"{lacking.path}: has no item ids, so its item rows cannot be matched with those "
                f"of {having.path}"
            )
        ids = [ItemIdFile(file.beside) for file in self.files]
        numbers = ItemNumbers(sum(self.sizes))
        self._base_catalogue = None
        base_differs = self.base is not None and hashes[-1] != hashes[0]
        positions = None
        if len(set(hashes[: len(self.files)])) > 1:
            positions = self._unite(ids, numbers)
            base_differs = self.base is not None
        else:
            for file, own in zip(self.files, ids, strict=True):
                self.abouts.append(_read_about(file, own))
            listed = [own for own in ids if own.count is not None]
            self.item_ids = MergedIds(listed[:1], []) if listed else None
        self.catalogue = CatalogueUnion(None, positions, sizes, rows)
        if base_differs and self.base is not None:
            if not numbers.count:
                if self.item_ids is None:
                    raise InputError(
                        f"{ids[0].path}: no such file, which has the item ids that match the rows "
                        f"of {self.base.path}"
                    )
                numbers.add(self.item_ids.files[0], sizes[0])
            items = numbers.count
            own = ItemIdFile(self.base.beside)
            found = _numbered(self.base, own, self.sizes[-1], numbers)
            in_base = inverse(found, numbers.count)[:items]
            self._base_catalogue = CatalogueUnion(None, [in_base], [self.sizes[-1]], rows)

    def _unite(self, ids: Sequence[ItemIdFile], numbers: ItemNumbers) -> list[torch.Tensor]:
        """`CatalogueUnion.positions` of the members, one file of ids after another."""
        found, starts = [], []
        for file, own, size in zip(self.files, ids, self.sizes, strict=False):
            starts.append(numbers.count)
            found.append(_numbered(file, own, size, numbers))
            self.abouts.append(own.about)
        if self.base is None:
            numbers.forget()  # the larger part of what is held by now
        found.reverse()
        positions = [inverse(found.pop(), numbers.count) for _ in range(len(found))]
        ends = [*starts[1:], numbers.count]
        news = [p[a:b].clone() for p, a, b in zip(positions, starts, ends, strict=True)]
        self.item_ids = MergedIds(ids, news[1:])
        _check_shared(self.files, self.item_ids, positions)
        return positions


def _check_shared(
    files: Sequence[TensorFile], ids: MergedIds, positions: Sequence[torch.Tensor]
) -> None:
    """Refuse a member that has no item in common with any other: its ids are written otherwise."""
    counts = owner_counts(positions)
    for file, own in zip(files, positions, strict=True):
        has = own >= 0
        if bool(has.any()) and not bool(has.all()) and int(counts[has].max()) == 1:
            example, other = (ids.at(int(kind.int().argmax())) for kind in (has, ~has))
            raise InputError(
                f"{file.path}: shares no item with the others: its ids are like {shown(example)}, "
                f"theirs like {shown(other)}; write them alike"
            )


def _identity(file: TensorFile, hashes: Mapping[Path, str]) -> dict[str, Any]:
    return {"file": file.path.name, "sha256": hashes.get(file.path, UNKNOWN)}


def _length(file: TensorFile, name: str) -> int:
    shape = file.layout[name][1]
    return shape[0] if shape else 1


def _model_of(file: TensorFile) -> SequenceEncoder | None:
    """Return an empty model of the file's class, with its tensors; None for another file."""
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


def _read_about(file: TensorFile, ids: ItemIdFile) -> dict[str, Any]:
    """Return the JSON beside a model file without its item ids, checked; {} without one."""
    if file.about.get("kind") != "model" or not ids.path.is_file():
        return {}
    for _ in ids.pieces():
        pass
    _check_about(file, ids)
    return ids.about


def _numbered(file: TensorFile, ids: ItemIdFile, size: int, numbers: ItemNumbers) -> torch.Tensor:
    """(size,) numbers of a model file's item ids, which must be there."""
    if file.about.get("kind") != "model" or not ids.path.is_file():
        raise InputError(f"{ids.path}: no such file, which has the item ids of {file.path.name}")
    found = numbers.add(ids, size)
    _check_about(file, ids)
    return found


def _check_about(file: TensorFile, ids: ItemIdFile) -> None:
    """Check that the JSON is that of the model file."""
    metrics = ids.about.get("metrics", {})
    known = isinstance(metrics, dict) and all(type(v) in (int, float) for v in metrics.values())
    if not known:
        raise InputError(f"{ids.path}: its metrics are not numbers by name")
    if file.about.get("item_ids_sha256") != ids.sha256:
        raise InputError(f"{ids.path}: its item_ids are not those of {file.path.name}")
