"""Model files: a safetensors file and a JSON file beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkern.encoders import FORMER_NAMES, MODELS, SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.files import (
    atomic_path,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from fisherkern.fingerprint import item_ids_sha256
from fisherkern.provenance import versions

PathLike = str | os.PathLike[str]


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
        path: the file, ending in .safetensors.
        metrics: numbers by name.
        extra: any JSON values by name.

    Raises:
        InputError: another suffix, a class that `load_model` could not rebuild, or a system that
            refuses to write.
    """
    path = _model_path(path)
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
    with atomic_path(path) as temporary:
        write_tensors(temporary, model.state_dict(), header)
        write_json(path.with_suffix(".json"), about)


def load_model(path: PathLike) -> SequenceEncoder:
    """Load the model that `save_model` wrote, on the CPU, in eval mode.

    Args:
        path: the .safetensors file. Without the JSON file beside it `item_ids` is None.

    Returns:
        The encoder; NaN values are loaded as they are.

    Raises:
        InputError: a file that is not a model, an unknown class, item ids that are another model's,
            or a tensor that is missing, unexpected or of the wrong shape or type.
    """
    path = _model_path(path)
    tensors, header = read_tensors(path)
    if header.get("kind") != "model":
        raise InputError(f"{path}: not a model file of fisherkern")
    name = header.get("class")
    name = FORMER_NAMES.get(str(name), name)
    if name not in MODELS:
        raise InputError(f"{path}: unknown encoder {name!r}; known: {', '.join(MODELS)}")
    try:
        # On the meta device nothing is drawn or allocated; the file's tensors move in below.
        with torch.device("meta"):
            model = MODELS[name](**header["config"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its config does not fit {name}: {error}") from None
    check_stored_tensors(path, tensors, model.state_dict())
    model.load_state_dict(tensors, assign=True)
    about = path.with_suffix(".json")
    if about.is_file():
        content = read_json(about)
        item_ids = content.get("item_ids") if isinstance(content, dict) else None
        if item_ids_sha256(item_ids) != header.get("item_ids_sha256"):
            raise InputError(f"{about}: its item_ids are not those of {path.name}")
        model.item_ids = item_ids
    return model.eval()


def check_stored_tensors(
    path: PathLike, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Raise InputError unless `tensors` has the names, shapes and kinds of `expected`."""
    for name, tensor in expected.items():
        if name not in tensors:
            raise InputError(f"{path}: tensor {name!r} is missing")
        if tensors[name].shape != tensor.shape:
            raise InputError(
                f"{path}: tensor {name!r} has shape {tuple(tensors[name].shape)}, "
                f"not {tuple(tensor.shape)}"
            )
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            raise InputError(f"{path}: tensor {name!r} is {tensors[name].dtype}")
    for name in tensors:
        if name not in expected:
            raise InputError(f"{path}: tensor {name!r} is not part of the model")


def _model_path(path: PathLike) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: a model file's name must end in .safetensors")
    return path
