"""Folders of `torch.distributed.checkpoint` written whole or not at all, and read by rows."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.adapters.files.dcp_files import ABOUT, DcpFolder, is_dcp
from fisherkern.adapters.sharded.models import is_dtensor, laid_out, local_part
from fisherkern.errors import InputError, shown
from fisherkern.files import write_json
from fisherkern.processes import rank, together, world

SUFFIX = ".dcp"
#: In a folder, what x.json is beside x.safetensors.
MODEL_JSON = "model.json"
# Under which keys training programs keep a model's tensors.
_KEYS = ("model", "state_dict", "module", "app.model")


def names_dcp(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a folder of `torch.distributed.checkpoint`, there or not."""
    return Path(path).suffix == SUFFIX or is_dcp(path)


def save_dcp(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder; every process calls this, and writes what it has of `DTensor`s.

    Args:
        path: The folder; another one of the kind is replaced when this one is whole.
        tensors: By name, the same names in all processes.
        about: JSON values for fisherkern.json.
        beside: File name -> JSON value of more files.

    Raises:
        InputError: Something else is there, or a process could not write.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.part")
    with together():
        if rank() == 0:
            if target.exists() and not is_dcp(target):
                raise InputError(f"{target}: is there, and no folder of a distributed checkpoint")
            shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(target, temporary, tensors)
        with together():
            if rank() == 0:
                by_rows = sorted(name for name, own in tensors.items() if is_dtensor(own))
                for name, value in {ABOUT: {**about, "by_rows": by_rows}, **(beside or {})}.items():
                    write_json(temporary / name, value)
                _rename(temporary, target)
    finally:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(target: Path, temporary: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the folder under another name; a process that fails ends all."""
    import torch.distributed.checkpoint as checkpointing

    state = {name: tensor.detach() for name, tensor in tensors.items()}
    alone = world() == 1
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            checkpointing.save(state, checkpoint_id=temporary, no_dist=alone)
    except checkpointing.CheckpointException as failed:
        reasons = [reason for reason, _ in failed.failures.values()]
        said = str(reasons[0]).splitlines() if reasons else []
        raise InputError(f"{target}: could not be written: {(said or ['?'])[0]}") from None
    except (OSError, RuntimeError) as failed:
        said = str(failed).splitlines()
        raise InputError(f"{target}: could not be written: {(said or ['?'])[0]}") from None


def _rename(temporary: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    try:
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{target}: could not be written: {error.strerror}") from None


def load_by_rows(
    folder: DcpFolder, mesh: Any = None, by_rows: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Read a folder's tensors, those `by_rows` as `DTensor`s of which a process reads its rows.

    Args:
        folder: The folder.
        mesh: A device mesh of one dimension; None reads everything whole.
        by_rows: Names. Default: of what was a `DTensor` when it was written.

    Raises:
        InputError: The mesh has several dimensions.
    """
    if mesh is None:
        return dict(folder)
    if mesh.ndim != 1:
        raise InputError(f"mesh: has {mesh.ndim} dimensions, and rows lie over one")
    given = folder.about.get("by_rows", []) if by_rows is None else by_rows
    return {
        name: _rows_of(folder, name, mesh) if name in given else folder[name] for name in folder
    }


def _rows_of(folder: DcpFolder, name: str, mesh: Any) -> Tensor:
    """Return this process's rows of a tensor, as `distribute_tensor` deals them."""
    from torch.distributed.tensor import DTensor, Shard

    shape = folder.tensors[name].shape
    share = -(-shape[0] // mesh.size())
    start, stop = (min(shape[0], (mesh.get_local_rank() + i) * share) for i in (0, 1))
    local = folder.rows(name, start, stop).to(mesh.device_type)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    )


def load_dcp(model: Any, path: str | os.PathLike[str]) -> None:
    """Load a folder of `torch.distributed.checkpoint` into a model of any library, in place.

    Nothing in the folder is ever run. A `DTensor` of the model takes the rows that it has,
    however many processes wrote them; every process calls this.

    Args:
        model: A model as every function here takes it. Its tensors may stand in the folder under
            "model", "state_dict" or "module".
        path: The folder.

    Raises:
        InputError: It is no such folder, a shard is missing or cut short, or a tensor of the
            model is missing or of another shape.
    """
    module = ModelAdapter.of(model).module
    folder = DcpFolder(path)
    state = module.state_dict()
    heads = ["", *(f"{key}." for key in _KEYS)]
    head = max(heads, key=lambda own: sum(own + name in folder for name in state))
    for name, target in state.items():
        if head + name not in folder:
            raise InputError(f"{path}: tensor {shown(name)} is missing")
        found = folder.tensors[head + name].shape
        if found != tuple(target.shape):
            raise InputError(
                f"{path}: tensor {shown(name)} has shape {found}, not {tuple(target.shape)}"
            )
    with torch.no_grad():
        for name, target in state.items():
            _fill(folder, head + name, target)


def _fill(folder: DcpFolder, name: str, target: Any) -> None:
    if not is_dtensor(target):
        target.copy_(folder[name])
        return
    from torch.distributed.tensor import Shard

    mesh = target.device_mesh
    if mesh.ndim == 1 and target.placements == (Shard(0),):
        target.to_local().copy_(local_part(_rows_of(folder, name, mesh)))
        return
    whole = folder[name].to(target.to_local())
    target.to_local().copy_(local_part(laid_out(whole, target)))
