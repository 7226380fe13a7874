"""Folders of `torch.distributed.checkpoint` among the files that are merged."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

from torch import Tensor

from fisherkern.adapters import load_tensors
from fisherkern.adapters.files.dcp_files import DcpFolder, FileWindow, is_dcp
from fisherkern.adapters.sharded.dcp import MODEL_JSON, SUFFIX, save_dcp
from fisherkern.errors import InputError, shown
from fisherkern.files import RunningHash, read_json
from fisherkern.merging.files.factored_file import FactoredFile
from fisherkern.merging.files.native_files import KINDS, open_member, raw_size
from fisherkern.merging.files.tensor_files import TensorFile, most_between, raw
from fisherkern.processes import rank, together

_Given = ParamSpec("_Given")


class DcpFile(TensorFile):
    """The tensors of a folder, read a block of rows at a time as those of a file are."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._folder = DcpFolder(path)
        self.metadata = {}
        self.about = {k: v for k, v in self._folder.about.items() if k != "by_rows"}
        self.layout = {}
        for name, tensor in sorted(self._folder.tensors.items()):
            if tensor.dtype not in KINDS:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise InputError(f"{path}: tensor {shown(name)} is {kind}, which cannot be merged")
            self.layout[name] = KINDS[tensor.dtype], tensor.shape

    @property
    def beside(self) -> Path:
        """The JSON file that has the item ids of a model."""
        return self.path / MODEL_JSON

    def close(self) -> None:
        """Nothing is held open but by parts that were read."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start..stop of a tensor; a number is one row of shape ()."""
        return self._folder.rows(name, start, stop)

    def _fill(self, name: str, offset: int, view: memoryview) -> None:
        row = raw_size(self, name)
        view[:] = raw(self.rows(name, offset // row, (offset + len(view)) // row))

    def start_hash(self) -> None:
        """Hash from now on what is read."""
        try:
            for path in sorted(self.path.iterdir()):
                size = path.stat().st_size
                fill = FileWindow(path, 0, size).fill
                self._folder.hashes[path] = RunningHash(fill, size, most_between())
        except OSError as error:
            raise InputError(f"{self.path}: could not be read: {error.strerror}") from None

    def sha256(self) -> str:
        """Of the names and hashes of its files."""
        if not self._folder.hashes:
            self.start_hash()
        hashes = self._folder.hashes.items()
        lines = "".join(f"{running.hexdigest()}  {path.name}\n" for path, running in hashes)
        return hashlib.sha256(lines.encode()).hexdigest()


def open_any_member(path: str | os.PathLike[str]) -> TensorFile:
    """Open a model file of ours, a folder, or a native checkpoint."""
    return DcpFile(path) if is_dcp(path) else open_member(path)


def open_fisher(path: str | os.PathLike[str]) -> TensorFile:
    """Open a file or folder of `DiagFisher.save`."""
    return DcpFile(path) if is_dcp(path) else FactoredFile(path)


def into_folders(function: Callable[_Given, dict[str, Any]]) -> Callable[_Given, dict[str, Any]]:
    """Let a function that writes a file `out` write a folder x.dcp as well."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def called(*args: _Given.args, **kwargs: _Given.kwargs) -> dict[str, Any]:
        given = signature.bind(*args, **kwargs).arguments
        if Path(given["out"]).suffix != SUFFIX:
            return function(*args, **kwargs)
        by_name: Callable[..., dict[str, Any]] = function
        return _merged_folder(Path(given["out"]), lambda file: by_name(**{**given, "out": file}))

    return called


def _merged_folder(out: Path, merge: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Write what `merge` makes as a file into a folder: through a file beside it.

    Raises:
        InputError: Something else is there, or the system refuses.
    """
    scratch = out.with_name(f".{out.name}.merge")
    with together():
        if rank() == 0:
            if out.exists() and not is_dcp(out):
                raise InputError(f"{out}: is there, and no folder of a distributed checkpoint")
            shutil.rmtree(scratch, ignore_errors=True)
    try:
        whole = scratch / "merged.safetensors"
        provenance = merge(whole)
        with contextlib.closing(TensorFile(whole)) as file:
            header, about = file.about, file.beside
        beside = {MODEL_JSON: read_json(about)} if about.is_file() else {}
        save_dcp(out, load_tensors(whole), header, beside)
        with together():
            if rank() == 0:
                shutil.copyfile(whole.with_suffix(".md"), out / "README.md")
    except OSError as error:
        raise InputError(f"{out}: could not be written: {error.strerror}") from None
    finally:
        if rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    return provenance
