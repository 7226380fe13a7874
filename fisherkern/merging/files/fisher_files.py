"""The members' Fishers in files, in common units; `Fishers` for what does not fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkern.errors import InputError, shown
from fisherkern.merging.blocks import BLOCK
from fisherkern.merging.files.tensor_files import TensorFile, read_rows, rows_per_block
from fisherkern.merging.fishers import NOISE, block_sums

# Entries read at once, in whole blocks of `block_sums`.
READ = 16 * BLOCK

FisherReader = Callable[[int, int, Sequence[Tensor] | None], list[tuple[Tensor, float]]]


class FisherFiles:
    """Checked Fisher files of all members; sums and maxima are found in one pass over each."""

    def __init__(
        self,
        files: Sequence[TensorFile],
        members: Sequence[TensorFile],
        names: Sequence[str],
        normalize: str | None,
    ) -> None:
        """One file per member. `names`: the parameters."""
        self.files = files
        self._largest: list[dict[str, float]] = []
        self._means = []
        for file, member in zip(self.files, members, strict=True):
            _check(file, member, names)
            mean, largest = _survey(file, names)
            self._means.append(mean)
            self._largest.append(largest)
        common = sum(self._means) / max(1, len(self._means))
        self._units = self._means if normalize == "mean" else [common] * len(self._means)

    def scaled(self, name: str) -> FisherReader | None:
        """Each member's Fisher of some rows and its unit; None where it is noise.

        A function of (start, stop, None), or of the row of each member that each of the merged
        rows start..stop comes from, -1 for none. As `Fishers.of` decides.
        """
        informed = [
            largest[name] >= NOISE * mean
            for largest, mean in zip(self._largest, self._means, strict=True)
        ]
        if not any(informed):
            return None

        def rows(
            start: int, stop: int, wanted: Sequence[Tensor] | None
        ) -> list[tuple[Tensor, float]]:
            blocks = read_rows(self.files, name, start, stop, wanted)
            return [
                (block if known else torch.zeros_like(block), unit)
                for block, known, unit in zip(blocks, informed, self._units, strict=True)
            ]

        return rows

    def check_fingerprints(self, members: Sequence[TensorFile], names: Sequence[str]) -> None:
        """Each Fisher that says which model it was computed on was computed on its member."""
        for file, member in zip(self.files, members, strict=True):
            expected = file.about["meta"].get("fingerprint")
            if expected is not None:
                found = member.fingerprint(names, READ)
                if found != expected:
                    told = expected[:12] if isinstance(expected, str) else shown(expected)
                    raise InputError(
                        f"{file.path}: was computed on another model than {member.path}: its "
                        f"fingerprint is {told} and the member's {found[:12]}"
                    )

    def identities(self) -> list[dict[str, Any]]:
        """Name, hash and settings of each file."""
        kept = ("sampler", "k", "probes", "reduction", "seed", "num_sequences")
        return [
            {
                "file": file.path.name,
                "sha256": file.sha256(),
                "made": {key: file.about["meta"][key] for key in kept if key in file.about["meta"]},
            }
            for file in self.files
        ]


def _check(file: TensorFile, member: TensorFile, names: Sequence[str]) -> None:
    if file.about.get("kind") != "diag_fisher" or not isinstance(file.about.get("meta"), dict):
        raise InputError(f"{file.path}: not a Fisher file; `fisherkern fisher` writes one")
    for name in sorted(file.layout.keys() ^ set(names)):
        fault = "is missing" if name in names else f"is none of {member.path}'s parameters"
        raise InputError(f"{file.path}: tensor {name!r} {fault}")
    for name in names:
        own, shape = file.layout[name][1], member.layout[name][1]
        if own != shape:
            raise InputError(
                f"{file.path}: tensor {name!r} has shape {own} where the member's has {shape}"
            )
        if not file.floating(name):
            raise InputError(f"{file.path}: tensor {name!r} is {file.layout[name][0]}")


def _survey(file: TensorFile, names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """The mean over all entries, and each tensor's largest entry; values are checked."""
    sums: list[float] = []
    count = 0
    largest = {}
    for name in names:
        shape = file.layout[name][1]
        largest[name] = -math.inf
        # Rows in whole blocks, so that the sums are those of the tensor in memory.
        step = 16 * rows_per_block(shape, BLOCK)
        for block in file.blocks(name, step):
            if block.numel() == 0:
                continue
            low, high = (float(bound) for bound in torch.aminmax(block))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise InputError(f"{file.path}: tensor {name!r} holds a value that is not finite")
            if low < 0:
                raise InputError(f"{file.path}: tensor {name!r} holds a negative value")
            largest[name] = max(largest[name], high)
            sums.extend(block_sums(block))
            count += block.numel()
    mean = math.fsum(sums) / max(1, count)
    if mean <= 0:
        raise InputError(f"{file.path}: the Fisher is zero everywhere")
    return mean, largest
