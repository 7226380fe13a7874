"""The diagonal Fisher as a value: tensors by parameter name, and how they came about."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.files import load_tensors, save_tensors


class DiagFisher(Mapping[str, Tensor]):
    """Diagonal Fisher by parameter name: the mean over sequences, in each parameter's shape.

    `meta` says how it was made: sampler, k, probes, reduction, seed, num_sequences,
    captured_mass (topk: the mean of Σ_j p(y_j); None otherwise), fingerprint of the
    model, versions.
    """

    def __init__(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self._tensors = dict(tensors)
        self.meta = dict(meta)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        size = sum(tensor.numel() for tensor in self._tensors.values())
        return (
            f"DiagFisher({len(self)} tensors, {size} entries, sampler={self.meta.get('sampler')!r},"
            f" num_sequences={self.meta.get('num_sequences')})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with `meta` in its header, whole or not at all."""
        save_tensors(path, self._tensors, {"kind": "diag_fisher", "meta": self.meta})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DiagFisher:
        """Read what `save` wrote; InputError for any other, truncated or non-finite file."""
        tensors, header = load_tensors(path)
        if header.get("kind") != "diag_fisher" or not isinstance(header.get("meta"), dict):
            raise InputError(f"{path}: not a Fisher file; `fisherkern fisher` writes one")
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all() or (tensor < 0).any():
                raise InputError(f"{path}: tensor '{name}' has a negative or non-finite entry")
        return cls(tensors, header["meta"])
