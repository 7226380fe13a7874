"""Model files: a safetensors file and a JSON file beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkern.adapters.files.dcp_files import DcpFolder
from fisherkern.adapters.sharded.dcp import MODEL_JSON, load_by_rows, names_dcp, save_dcp
from fisherkern.adapters.sharded.models import is_dtensor
from fisherkern.encoders import FORMER_NAMES, MODELS, SequenceEncoder, stored_encoder
from fisherkern.errors import InputError, shown
from fisherkern.files import (
    atomic_path,
    is_file,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from fisherkern.fingerprint import item_ids_sha256
from fisherkern.provenance import versions

PathLike = str | os.PathLike[str]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_model(
    model: SequenceEncoder,
    path: PathLike,
    *,
    metrics: Mapping[str, float] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as `x.safetensors` (tensors, class, config) and `x.json` beside it.

    The JSON holds item ids, `metrics`, `extra`, versions and the commit of fisherkern's source
    where it is known. Both files are complete before either takes its name, the JSON first, so a
    model file is never without its item ids and a full disk leaves both as they were.

    Args:
        model: an encoder of ours.
        path: the file, ending in .safetensors. Or x.dcp, a folder of
            `torch.distributed.checkpoint`, which `DTensor`s need: every process writes what it
            has, and the JSON is model.json in it.
        metrics: numbers by name.
        extra: any JSON values by name.

    Raises:
        InputError: another suffix, a class that `load_model` could not rebuild, or a system that
            refuses to write.
    """
    path = Path(path) if names_dcp(path) else _model_path(path)
    name = type(model).__name__
    if MODELS.get(name) is not type(model):
        raise InputError(f"{path}: {name} is not an encoder that a model file can hold")
    about = {
        "class": name,
        "config": model.config,
        "item_ids": model.item_ids,
        "metrics": dict(metrics or {}),
        "extra": dict(extra or {}),
        "versions": versions(),
    }
    header = {
        "kind": "model",
        "class": name,
        "config": model.config,
        "item_ids_sha256": item_ids_sha256(model.item_ids),
    }
    if names_dcp(path):
        save_dcp(path, model.state_dict(), header, {MODEL_JSON: about})
        return
    if any(is_dtensor(tensor) for tensor in model.state_dict().values()):
        raise InputError(f"{path}: tensors over several processes go into a folder, x.dcp")
    with atomic_path(path) as temporary:
        write_tensors(temporary, model.state_dict(), header)
        write_json(path.with_suffix(".json"), about)


def load_model(path: PathLike, mesh: Any = None) -> SequenceEncoder:
    """Load the model that `save_model` wrote, on the CPU, in eval mode.

    Args:
        path: the .safetensors file. Without the JSON file beside it `item_ids` and `merge_report`
            are None. Or the folder x.dcp.
        mesh: the device mesh of all processes, of one dimension, over which the rows of the item
            tables of a folder lie: each process reads its own, however many wrote them. Default:
            every process reads all.

    Returns:
        The encoder; NaN values are loaded as they are.

    Raises:
        InputError: a file that is not a model, an unknown class, item ids that are another model's,
            or a tensor that is missing, unexpected or of the wrong shape or type.
    """
    tensors: Mapping[str, Tensor]
    if names_dcp(path):
        path = Path(path)
        folder = DcpFolder(path)
        tensors, header, about = folder.described(), folder.about, path / MODEL_JSON
    elif mesh is not None:
        raise InputError(f"{path}: a mesh takes the rows of a folder, x.dcp")
    else:
        path = _model_path(path)
        tensors, header = read_tensors(path)
        about = path.with_suffix(".json")
    if header.get("kind") != "model":
        raise InputError(f"{path}: not a model file of fisherkern")
    name = header.get("class")
    name = FORMER_NAMES.get(name, name) if isinstance(name, str) else name
    shapes = {own: tensor.shape for own, tensor in tensors.items()}
    model = stored_encoder(path, name, header.get("config"), shapes, MODELS)
    if mesh is not None and "items" in model.config:
        raise InputError(f"{path}: its items are made of parts, which a mesh does not share out")
    check_stored_tensors(path, tensors, model.state_dict())
    if names_dcp(path):
        by_rows = [] if mesh is None else list(model.item_parameters())
        tensors = load_by_rows(folder, mesh, by_rows)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # values that a part of the model refuses
        raise InputError(f"{path}: {error}") from None
    if is_file(about):
        content = read_json(about)
        ids_sha256 = header.get("item_ids_sha256")
        model.item_ids = _item_ids(path, about, content, ids_sha256, model.num_items)
        model.merge_report = _merge_report(content)
    return model.eval()


def _merge_report(content: Any) -> dict[str, Any] | None:
    """Return how `merge` or `merge_files` made the model, where its JSON says so."""
    extra = content.get("extra") if isinstance(content, dict) else None
    extra = extra if isinstance(extra, dict) else {}
    report = extra.get("merge_report", extra.get("merge"))
    return report if isinstance(report, dict) else None


def _item_ids(
    path: Path, about: Path, content: Any, expected: object, size: int
) -> list[str] | None:
    """Return the item ids in the JSON beside a model file, which has their hash."""
    item_ids = content.get("item_ids") if isinstance(content, dict) else None
    if item_ids is not None:
        strings = isinstance(item_ids, list) and all(isinstance(item, str) for item in item_ids)
        if not strings or len(item_ids) != size:
            raise InputError(f"{about}: its item_ids are not the {size} strings of the model")
    if item_ids_sha256(item_ids) != expected:
        raise InputError(f"{about}: its item_ids are not those of {path.name}")
    return item_ids


def check_stored_tensors(
    path: PathLike, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Raise InputError unless `tensors` has the names, shapes and kinds of `expected`."""
    for name, tensor in expected.items():
        if name not in tensors:
            raise InputError(f"{path}: tensor {shown(name)} is missing")
        if tensors[name].shape != tensor.shape:
            raise InputError(
                f"{path}: tensor {shown(name)} has shape {tuple(tensors[name].shape)}, "
                f"not {tuple(tensor.shape)}"
            )
        found = tensors[name].dtype
        if found not in FLOATS if tensor.is_floating_point() else found != tensor.dtype:
            raise InputError(f"{path}: tensor {shown(name)} is {tensors[name].dtype}")
    for name in tensors:
        if name not in expected:
            raise InputError(f"{path}: tensor {shown(name)} is not part of the model")


def _model_path(path: PathLike) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: a model file's name must end in .safetensors")
    return path
