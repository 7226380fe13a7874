"""Results about a model: tensors by parameter name, and `meta`, which says how they were made."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fisherkern.adapters.files.dcp_files import DcpFolder
from fisherkern.adapters.sharded.dcp import load_by_rows, names_dcp, save_dcp
from fisherkern.adapters.sharded.models import is_dtensor, local_part
from fisherkern.errors import InputError, shown
from fisherkern.files import read_tensors, save_tensors
from fisherkern.fisher.factored import factor, multiplied
from fisherkern.fisher.second_moments import fisher_of_moments, moments_of

Self = TypeVar("Self", bound="NamedTensors")


class NamedTensors(Mapping[str, Tensor]):
    """Tensors by parameter name with `meta`, and the safetensors file that holds both."""

    #: The kind that the file's header names, and what `load` says of another file.
    KIND: ClassVar[str]
    OTHER: ClassVar[str]

    def __init__(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self._tensors = dict(tensors)
        for name, tensor in self._tensors.items():
            if not (isinstance(name, str) and isinstance(tensor, Tensor)):
                raise InputError(f"{shown(name)} is a {type(tensor).__name__}, no tensor by name")
        self.meta = dict(meta)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with `meta` in its header, whole or not at all.

        Args:
            path: The file to write; an existing one is replaced. With the suffix .dcp a folder
                of `torch.distributed.checkpoint`, which `DTensor`s need: every process writes
                what it has.

        Raises:
            InputError: `DTensor`s for a file, or a system that refuses to write.
        """
        self._save(path, self._tensors)

    def _save(self, path: str | os.PathLike[str], tensors: dict[str, Tensor], **more: Any) -> None:
        header = {"kind": self.KIND, "meta": self.meta, **more}
        if names_dcp(path):
            save_dcp(path, tensors, header)
            return
        if any(is_dtensor(tensor) for tensor in tensors.values()):
            raise InputError(f"{path}: tensors over several processes go into a folder, x.dcp")
        save_tensors(path, tensors, header)

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str], mesh: Any = None) -> Self:
        """Read what `save` wrote.

        Args:
            path: The file to read, or the folder x.dcp.
            mesh: The device mesh of all processes, of one dimension, over which tables lie that
                did when the folder was written, by however many. Default: every process reads all.

        Returns:
            The tensors and their `meta`.

        Raises:
            InputError: Another kind of file, a truncated one, or one with non-finite entries.
        """
        tensors: Mapping[str, Tensor]
        if names_dcp(path):
            folder = DcpFolder(path)
            tensors, header = load_by_rows(folder, mesh), folder.about
        else:
            tensors, header = read_tensors(path)
        if header.get("kind") != cls.KIND or not isinstance(header.get("meta"), dict):
            raise InputError(f"{path}: {cls.OTHER}")
        fingerprint = header["meta"].get("fingerprint")
        if not isinstance(fingerprint, str | None):
            raise InputError(f"{path}: its fingerprint is {shown(fingerprint)}")
        tensors = multiplied(tensors, header, path)
        for name, tensor in tensors.items():
            if (wrong := cls._wrong(local_part(tensor))) is not None:
                raise InputError(f"{path}: tensor {shown(name)} has {wrong}")
        return cls(tensors, header["meta"])

    @staticmethod
    def _wrong(tensor: Tensor) -> str | None:
        """Return what is wrong with a tensor; None where nothing is."""
        return None if torch.isfinite(tensor).all() else "a non-finite entry"


class DiagFisher(NamedTensors):
    """Diagonal Fisher by parameter name: the mean over sequences, in each parameter's shape.

    `meta` says how it was made: sampler, k, probes, reduction, seed, num_sequences,
    captured_mass (topk: the mean of Σ_j p(y_j); None otherwise), fingerprint of the
    model, hashes of its saved floating buffers, versions.
    """

    KIND = "diag_fisher"
    OTHER = "not a Fisher file; `fisherkern fisher` writes one"

    def __repr__(self) -> str:
        size = sum(tensor.numel() for tensor in self._tensors.values())
        return (
            f"DiagFisher({len(self)} tensors, {size} entries, sampler={self.meta.get('sampler')!r},"
            f" num_sequences={self.meta.get('num_sequences')})"
        )

    def save(self, path: str | os.PathLike[str], *, factored: int | None = None) -> None:
        """Write one safetensors file with `meta` in its header, whole or not at all.

        Args:
            path: As in `NamedTensors.save`.
            factored: Entries from which on a matrix is kept as its row and column sums, V + D
                numbers for V × D: the matrix of rank 1 that has these sums. Default: none is.

        Raises:
            InputError: A number below 1, a folder x.dcp with `factored`, or what
                `NamedTensors.save` refuses.

        Source: Shazeer and Stern, Adafactor, ICML 2018, arXiv 1804.04235.
        """
        if factored is None:
            super().save(path)
            return
        if names_dcp(path):
            raise InputError(f"factored: {path} is a folder; a file x.safetensors has factors")
        tensors, names = factor(self._tensors, factored)
        self._save(path, tensors, factored=names)

    @classmethod
    def from_optimizer(cls, optimizer: torch.optim.Optimizer, model: Any) -> DiagFisher:
        """Make a Fisher of the second moments of the optimiser that trained a model.

            F_i = v_i / (1 − β^t),   v_i ← β v_i + (1 − β) g_i²

        g is a step's gradient: of a batch's mean loss, with the labels of the data, at earlier
        weights; where the optimiser adds weight decay to it, as Adam does and AdamW does not, one
        warning says so. So F has neither the units nor the definition of `diag_fisher`; merge such
        Fishers with each other. No pass over the data is made.

        Args:
            optimizer: Adam, AdamW, NAdam, RAdam or RMSprop, after a step at least.
            model: The model that it trained, as it is; every trainable parameter has a moment.

        Returns:
            Tensors by parameter name, fp32 or wider. `meta` has the sampler "optimizer", the
            optimiser's class and its steps.

        Raises:
            InputError: An optimiser without second moments, or a parameter it never moved.

        Source: Li et al., Fishers for Free?, ICML 2025, arXiv 2507.18807.
        """
        moments = moments_of(optimizer, model)
        return cls(*fisher_of_moments(moments, type(optimizer).__name__, model))

    @staticmethod
    def _wrong(tensor: Tensor) -> str | None:
        right = torch.isfinite(tensor).all() and not (tensor < 0).any()
        return None if right else "a negative or non-finite entry"
