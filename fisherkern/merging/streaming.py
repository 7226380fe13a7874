"""merge_files(): model files merged a block of rows at a time, without a model in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fisherkern.encoders import ENCODERS
from fisherkern.errors import InputError
from fisherkern.files import atomic_path, read_json
from fisherkern.merging import checks
from fisherkern.merging.blocks import BLOCK, TensorBlocks, as_table
from fisherkern.merging.card import model_card
from fisherkern.merging.fisher_files import FisherFiles
from fisherkern.merging.rules import Operands, Rule, average
from fisherkern.merging.tensor_files import (
    TensorFile,
    opened,
    raw,
    rows_per_block,
    spans,
    write_header,
)

PathLike = str | os.PathLike[str]

# Rules that need no more than the rows they merge.
METHODS = ("uniform", "weighted", "fisher", "task_arithmetic", "dare")
# Entries of each member read at once, and of each Fisher: a multiple of the blocks computed.
READ = 16 * BLOCK


def merge_files(
    paths: Sequence[PathLike],
    out: PathLike,
    *,
    method: str | None = None,
    weights: Sequence[float] | None = None,
    fishers: Sequence[PathLike] | None = None,
    base: PathLike | None = None,
    options: Mapping[str, Any] | None = None,
    floor: float = 0.1,
    normalize: str | None = "mean",
    check_fingerprint: bool = True,
    seed: int = 0,
    metrics: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """`merge` from files into a file: the same result to the last bit, in little memory.

    paths: M model files of `save_model` of one class and catalogue, or M safetensors files of
        anyone's with the same names, shapes and types. Their floating tensors are merged;
        others must agree. In anyone's files a floating tensor that holds infinities and is the
        same in all members is kept.
    out: x.safetensors; beside it x.md, a model card, and for models x.json, so that `load_model`
        reads the result. Each takes its name when all three are whole, the model last; a
        failure leaves what was there before.
    method, weights, options, floor, normalize, seed: as for `merge`; "uniform", "weighted",
        "fisher" (groups "entry" and "row"), "task_arithmetic" and "dare", the rules that need
        only the rows they merge, and numbers as weights.
    fishers: M files of `DiagFisher.save`. base: a file like the members'.
    metrics: of the merged model, for its card.

    Returns the provenance, which also stands in the file's metadata, under "merge": method,
    weights, options, floor, normalize, seed; members, fishers and base (name and sha256 of the
    files; a member's metrics, and how a Fisher was made); metrics and versions. No time or
    place is in it: the same inputs give the same bytes.

    Reads members and base twice, with Fishers everything three times. Holds a million entries
    of each member and Fisher (4 MB in float32), and the item ids as a list of strings.
    Raises InputError, naming file and tensor, for anything that does not fit, a NaN included.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: the name of the merged file must end in .safetensors")
    if not paths:
        raise InputError("there is no model to merge")
    if fishers is not None and len(fishers) != len(paths):
        raise InputError(f"there are {len(fishers)} fishers for {len(paths)} members")
    ancestors = [] if base is None else [base]
    for path in (*paths, *(fishers or []), *ancestors):
        if out.exists() and Path(path).exists() and out.samefile(path):
            raise InputError(f"{out}: is one of the files that are merged")
    inputs = {"weights": weights, "fishers": fishers, "base": base}
    name, rule, settings = _choose(method, inputs, options, floor, normalize)
    lam = checks.check_weights(weights, len(paths))
    with opened(paths, fishers or [], ancestors) as (members, fisher_files, bases):
        _check_alike([*members, *bases])
        job = _Job(members, bases[0] if bases else None, rule, settings, lam)
        job.floor, job.seed = floor, seed
        if fishers is not None:
            job.fishers = FisherFiles(fisher_files, members[0], job.parameters, normalize)
            if check_fingerprint:
                job.fishers.check_fingerprints(members, job.parameters)
        abouts = [_read_about(member) for member in members]
        provenance = {
            "method": name,
            "weights": lam,
            "options": settings,
            "floor": floor,
            "normalize": normalize,
            "seed": seed,
            "members": [
                {**_identity(member), "metrics": about.get("metrics", {})}
                for member, about in zip(members, abouts, strict=True)
            ],
            "fishers": None if job.fishers is None else job.fishers.identities(),
            "base": _identity(bases[0]) if bases else None,
            "metrics": {key: float(value) for key, value in (metrics or {}).items()},
            "versions": {"fisherkern": _version(), "torch": str(torch.__version__)},
        }
        _write(out, job, provenance, _item_ids(members, abouts))
    return provenance


def _choose(
    method: str | None,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    floor: float,
    normalize: str | None,
) -> tuple[str, Rule, dict[str, Any]]:
    if isinstance(inputs["weights"], str):
        raise InputError("merge_files takes numbers as weights, not words")
    unused = dict.fromkeys(("grams", "products", "score", "validation"))
    if method is not None and method not in METHODS:
        raise InputError(f"method {method!r} is not one that files merge by: {', '.join(METHODS)}")
    chosen = checks.choose_rule(method, {**inputs, **unused}, options, floor, normalize, None)
    group = chosen[2].get("group", "entry")
    if group not in ("entry", "row"):
        raise InputError(f"option 'group' is {group!r}, which needs whole tensors: use merge")
    return chosen


def _check_alike(files: Sequence[TensorFile]) -> None:
    """All files hold the same tensors, of one class, configuration and catalogue."""
    first = files[0]
    for other in files[1:]:
        for one, two in ((first, other), (other, first)):
            lacking = sorted(two.layout.keys() - one.layout.keys())
            if lacking:
                raise InputError(
                    f"{one.path}: tensor {lacking[0]!r} is missing, which {two.path} has"
                )
        for key, what in (("kind", "file"), ("class", "model")):
            if first.about.get(key) != other.about.get(key):
                raise InputError(
                    f"{other.path}: is a {other.about.get(key)} {what}, and {first.path} a "
                    f"{first.about.get(key)}"
                )
        for name, (kind, shape) in first.layout.items():
            own_kind, own_shape = other.layout[name]
            if own_shape != shape:
                raise InputError(
                    f"{other.path}: tensor {name!r} has shape {own_shape} and in {first.path} "
                    f"{shape}"
                )
            if own_kind != kind:
                raise InputError(
                    f"{other.path}: tensor {name!r} is {own_kind} and in {first.path} {kind}"
                )
        if first.about.get("item_ids_sha256") != other.about.get("item_ids_sha256"):
            raise InputError(
                f"{other.path}: has other item ids than {first.path}; merge unites catalogues"
            )
    configs: list[Any] = [SimpleNamespace(config=file.about.get("config")) for file in files]
    checks.check_config(configs)


def _parameters(file: TensorFile) -> set[str] | None:
    """Names of the parameters of a model file's class; None where the class is not known."""
    if file.about.get("kind") != "model" or file.about.get("class") not in ENCODERS:
        return None
    try:
        with torch.device("meta"):
            model = ENCODERS[file.about["class"]](**file.about["config"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{file.path}: its config does not fit its class: {error}") from None
    expected = model.state_dict()
    for name in expected.keys() ^ file.layout.keys():
        fault = "is missing" if name in expected else "is not part of the model"
        raise InputError(f"{file.path}: tensor {name!r} {fault}")
    for name, tensor in expected.items():
        if file.layout[name][1] != tuple(tensor.shape):
            raise InputError(
                f"{file.path}: tensor {name!r} has shape {file.layout[name][1]}, not "
                f"{tuple(tensor.shape)}"
            )
    return {name for name, _ in model.named_parameters()}


class _Job:
    """What is merged and how, tensor by tensor."""

    def __init__(
        self,
        members: Sequence[TensorFile],
        base: TensorFile | None,
        rule: Rule,
        options: dict[str, Any],
        weights: list[float],
    ) -> None:
        self.members, self.base, self.rule = members, base, rule
        self.options, self.weights = options, weights
        self.fishers: FisherFiles | None = None
        self.floor, self.seed = 0.0, 0
        self._known = _parameters(members[0])
        first = members[0]
        self.parameters = sorted(
            name
            for name in first.layout
            if first.floating(name) and (self._known is None or name in self._known)
        )

    def write(self, name: str, stream: BinaryIO) -> None:
        """The merged tensor's bytes."""
        shape = self.members[0].layout[name][1]
        scaled = self.fishers.scaled(name) if self.fishers and name in self.parameters else None
        for start, stop in spans(shape, rows_per_block(shape, READ)):
            own = [member.rows(name, start, stop) for member in self.members]
            base = None if self.base is None else self.base.rows(name, start, stop)
            if self._fixed(name, own, base):
                stream.write(raw(own[0]))
                continue
            function: Callable[[Operands], Tensor] = average
            blocks = TensorBlocks(name, own)
            if name in self.parameters:
                fishers = None if scaled is None else scaled(start, stop)
                known: dict[str, Any] = {"options": self.options, "seed": self.seed}
                blocks = TensorBlocks(
                    name, own, fishers=fishers, base=base, floor=self.floor, **known
                )
                function = self.rule.function
            merged = torch.empty_like(own[0])
            for place, operands in blocks.operands(self.weights, None):
                moved = dataclasses.replace(operands, start=operands.start + start)
                as_table(merged)[place] = function(moved).to(merged.dtype)
            stream.write(raw(merged))

    def _fixed(self, name: str, own: Sequence[Tensor], base: Tensor | None) -> bool:
        """Whether the block is the same in all members and is no rule's; checks it if it is."""
        agree = all(torch.equal(block, own[0]) for block in own[1:])
        if not own[0].is_floating_point():
            if agree:
                return True
            odd = next(m for m, block in enumerate(own) if not torch.equal(block, own[0]))
            raise InputError(
                f"{self.members[odd].path}: tensor {name!r} differs from that of "
                f"{self.members[0].path}, and values of type {own[0].dtype} cannot be averaged"
            )
        if name not in self.parameters and agree:
            return True
        files = [*self.members, *([self.base] if self.base else [])]
        blocks = [*own, *([base] if base is not None else [])]
        if all(bool(block.isfinite().all()) for block in blocks):
            return False
        for file, block in zip(files, blocks, strict=True):
            if bool(block.isnan().any()):
                raise InputError(f"{file.path}: tensor {name!r} holds a NaN")
        if agree and self._known is None:
            return True
        for file, block in zip(files, blocks, strict=True):
            if not bool(block.isfinite().all()):
                raise InputError(f"{file.path}: tensor {name!r} holds an infinity")
        return False


def _read_about(member: TensorFile) -> dict[str, Any]:
    """The JSON beside a model file without its item ids; {} where there is none."""
    path = member.path.with_suffix(".json")
    if member.about.get("kind") != "model" or not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    return {**content, "item_ids": None}


def _item_ids(
    members: Sequence[TensorFile], abouts: Sequence[Mapping[str, Any]]
) -> list[str] | None:
    """The members' common item ids, of the first that has its JSON file."""
    expected = members[0].about.get("item_ids_sha256")
    for member, about in zip(members, abouts, strict=True):
        if expected is None or not about:
            continue
        path = member.path.with_suffix(".json")
        found = read_json(path).get("item_ids")
        if hashlib.sha256(json.dumps(found).encode()).hexdigest() != expected:
            raise InputError(f"{path}: its item_ids are not those of {member.path.name}")
        return found
    return None


def _version() -> str:
    try:
        return importlib.metadata.version("fisherkern")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _identity(file: TensorFile) -> dict[str, Any]:
    return {"file": file.path.name, "sha256": file.sha256()}


def _write(out: Path, job: _Job, provenance: dict[str, Any], item_ids: list[str] | None) -> None:
    """The model, its JSON file if it is a model of ours, and its card, all or none."""
    first = job.members[0]
    header = {**first.about, "merge": provenance}
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    card = model_card(out.name, first.about, provenance)
    with atomic_path(out) as model:
        with model.open("wb") as stream:
            for name in write_header(stream, first.layout, {**first.metadata, "fisherkern": text}):
                job.write(name, stream)
        with atomic_path(out.with_suffix(".md")) as beside:
            beside.write_text(card, encoding="utf-8")
            if first.about.get("kind") == "model":
                about = {
                    "class": first.about.get("class"),
                    "config": first.about.get("config"),
                    "item_ids": item_ids,
                    "metrics": provenance["metrics"],
                    "extra": {"merge": provenance},
                    "versions": provenance["versions"],
                }
                with atomic_path(out.with_suffix(".json")) as temporary:
                    with temporary.open("w", encoding="utf-8") as text_stream:
                        # Piece by piece: item ids may be many.
                        json.dump(about, text_stream, indent=1, allow_nan=False)
                        text_stream.write("\n")
