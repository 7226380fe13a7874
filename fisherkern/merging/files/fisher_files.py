"""The members' Fishers in files, in common units; `Fishers` for what does not fit in memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkern.adapters.names import fit_names
from fisherkern.errors import InputError, shown
from fisherkern.merging.blocks import BLOCK
from fisherkern.merging.checks import check_buffers
from fisherkern.merging.files.tensor_files import TensorFile, rows_per_block
from fisherkern.merging.fishers import NOISE, block_sums, check_definitions
from fisherkern.processes import gathered, rank, together, world

log = logging.getLogger("fisherkern")

# Entries read at once, in whole blocks of `block_sums`.
READ = 16 * BLOCK


@dataclass(frozen=True)
class ScaledFisher:
    """A tensor in the members' Fishers: its names there, which hold information, and the units."""

    names: Sequence[str]
    informed: Sequence[bool]
    units: Sequence[float]

    def of(self, blocks: Sequence[Tensor]) -> list[tuple[Tensor, float]]:
        """Return each member's block, and the unit to divide it by."""
        return [
            (block if known else torch.zeros_like(block), unit)
            for block, known, unit in zip(blocks, self.informed, self.units, strict=True)
        ]


class FisherFiles:
    """Checked Fisher files of all members; sums and maxima are found in one pass over each."""

    def __init__(
        self,
        files: Sequence[TensorFile],
        members: Sequence[TensorFile],
        names: Sequence[str],
        normalize: str | None,
    ) -> None:
        """One file per member. `names`: the parameters.

        In a Fisher of a native checkpoint, names may have a wrapper's prefixes or lack them, and
        buffers and frozen parameters may be missing.
        """
        self.files = files
        self._largest: list[dict[str, float]] = []
        self._means = []
        # Per file: name in the member -> name in the Fisher.
        self._names: list[dict[str, str]] = []
        made = [(str(file.path), file.about.get("meta")) for file in files]
        check_definitions([(name, meta) for name, meta in made if isinstance(meta, dict)])
        with together():
            for file, member in zip(self.files, members, strict=True):
                own = _names_of(file, member, names)
                _check(file, member, own)
                self._names.append(own)
            # Each process reads its share of the files.
            share = [
                (number, *_survey(files[number], self._names[number]))
                for number in range(rank(), len(files), world())
            ]
        for _, mean, largest in sorted(own for part in gathered(share) for own in part):
            self._means.append(mean)
            self._largest.append(largest)
        common = sum(self._means) / max(1, len(self._means))
        self._units = self._means if normalize == "mean" else [common] * len(self._means)

    def scaled(self, name: str) -> ScaledFisher | None:
        """Each member's Fisher of a tensor; None where it is noise, as `Fishers.of` decides."""
        if not all(name in own for own in self._names):
            return None
        informed = [
            largest[name] >= NOISE * mean
            for largest, mean in zip(self._largest, self._means, strict=True)
        ]
        if not any(informed):
            return None
        return ScaledFisher([own[name] for own in self._names], informed, self._units)

    def check_fingerprints(self, members: Sequence[TensorFile], names: Sequence[str]) -> None:
        """Each Fisher that says which model it was computed on was computed on its member.

        Of a native checkpoint that has more tensors than the Fisher, some of which may be
        parameters, a difference says nothing; it is logged. Each process asks about its share.
        """
        triples = list(zip(self.files, members, self._names, strict=True))
        for file, member, own in triples[rank() :: world()]:
            expected = file.about["meta"].get("fingerprint")
            if expected is None:
                continue
            known = {theirs: name for name, theirs in own.items()}
            found = member.fingerprint(known, READ)
            if found == expected:
                check_buffers(
                    file.about["meta"], _buffer_hashes(file, member), str(file.path), member.path
                )
                continue
            others = [other for other in members if other is not member]
            if len(own) < len(names) and not any(
                set(known.values()) <= other.layout.keys()
                and other.fingerprint(known, READ) == expected
                for other in others
            ):
                log.warning(
                    "%s has no values for some tensors of %s, so it cannot be told whether it was "
                    "computed on it",
                    file.path,
                    member.path,
                )
                continue
            told = expected[:12] if isinstance(expected, str) else shown(expected)
            raise InputError(
                f"{file.path}: was computed on another model than {member.path}: its "
                f"fingerprint is {told} and the member's {found[:12]}"
            )

    def uncovered(self, names: Sequence[str]) -> list[str]:
        """Parameters that some member's Fisher lacks, which lambda averages."""
        return [name for name in names if not all(name in own for own in self._names)]

    def identities(self, hashes: Mapping[Path, str]) -> list[dict[str, Any]]:
        """Name, hash (by path in `hashes`) and settings of each file."""
        kept = ("sampler", "k", "probes", "reduction", "seed", "num_sequences")
        return [
            {
                "file": file.path.name,
                "sha256": hashes[file.path],
                "made": {key: file.about["meta"][key] for key in kept if key in file.about["meta"]},
            }
            for file in self.files
        ]


def _names_of(file: TensorFile, member: TensorFile, names: Sequence[str]) -> dict[str, str]:
    """Name in the member -> name in its Fisher, which has no other tensors."""
    if file.about.get("kind") != "diag_fisher" or not isinstance(file.about.get("meta"), dict):
        raise InputError(f"{file.path}: not a Fisher file; `fisherkern fisher` writes one")
    if member.checkpoint is None:
        for name in sorted(file.layout.keys() ^ set(names)):
            fault = "is missing" if name in names else f"is none of {member.path}'s parameters"
            raise InputError(f"{file.path}: tensor {name!r} {fault}")
        return {name: name for name in names}
    fitted = fit_names(file.layout, [*names, *member.aliases])
    found: dict[str, str] = {}
    for theirs in sorted(file.layout):
        own = fitted.get(theirs)
        own = None if own is None else member.aliases.get(own, own)
        if own is None:
            raise InputError(f"{file.path}: tensor {shown(theirs)} is none of {member.path}'s")
        if own in found:
            raise InputError(
                f"{file.path}: tensors {shown(found[own])} and {shown(theirs)} are one of "
                f"{member.path}'s"
            )
        found[own] = theirs
    return found


def _check(file: TensorFile, member: TensorFile, names: Mapping[str, str]) -> None:
    for name, theirs in names.items():
        own, shape = file.layout[theirs][1], member.layout[name][1]
        if own != shape:
            raise InputError(
                f"{file.path}: tensor {shown(theirs)} has shape {own} where the member's "
                f"has {shape}"
            )
        if not file.floating(theirs):
            raise InputError(f"{file.path}: tensor {shown(theirs)} is {file.layout[theirs][0]}")


def _survey(file: TensorFile, names: Mapping[str, str]) -> tuple[float, dict[str, float]]:
    """Return the mean over all entries, and each tensor's largest entry; values are checked."""
    sums: list[float] = []
    count = 0
    largest = {}
    for own, name in names.items():
        shape = file.layout[name][1]
        largest[own] = -math.inf
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
            largest[own] = max(largest[own], high)
            sums.extend(block_sums(block))
            count += block.numel()
    mean = math.fsum(sums) / max(1, count)
    if mean <= 0:
        raise InputError(f"{file.path}: the Fisher is zero everywhere")
    return mean, largest


def _buffer_hashes(file: TensorFile, member: TensorFile) -> dict[str, str]:
    """Hashes of the member's buffers that the Fisher's model had, as `buffer_hashes` has them."""
    names = file.about["meta"].get("buffers")
    known = fit_names(names if isinstance(names, dict) else (), [*member.layout, *member.aliases])
    own = {name: member.aliases.get(place, place) for name, place in known.items()}
    return {name: member.fingerprint({name: place}, READ) for name, place in own.items()}
