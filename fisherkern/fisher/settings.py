"""The arguments of `diag_fisher` as one object."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from fisherkern.checks import check_count, check_unit
from fisherkern.errors import InputError, shown

log = logging.getLogger("fisherkern")

# What a sampler has of its own, and what that is where it is not given.
_USED = {
    "exact": {"probes", "tol"},
    "sketch": {"probes"},
    "topk": {"k", "rescale"},
    "model": {"k", "replacement"},
    "random": {"k"},
    "target": {"weight"},
}
_NOT_GIVEN = {"k": None, "probes": None, "tol": None, "rescale": False, "weight": "probability"}
SAMPLERS = tuple(_USED)

_SKETCH_PROBES = 16
_ITEMS = 30
# Stands for as many probes as there are items.
_MANY_PROBES = 2**10


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `diag_fisher` was asked for; see there for each field."""

    sampler: str
    k: int | None
    probes: int | None
    seed: int
    tol: float | None
    rescale: bool
    weight: str
    replacement: bool = True
    reduction: str = "sequence"
    chunk: int | None = None
    positions: str | int = "last"
    check: bool = True

    def checked(self) -> Settings:
        """Return these settings, the sketch's default filled in; InputError for a bad one."""
        check_chunk(self.chunk)
        if self.reduction not in ("sequence", "batchwise"):
            raise InputError(f"reduction: {shown(self.reduction)} is not 'sequence' or 'batchwise'")
        self._check_positions()
        if self.sampler not in SAMPLERS:
            raise InputError(f"sampler: {shown(self.sampler)} is not one of {', '.join(SAMPLERS)}")
        check_count("seed:", self.seed, least=0)
        for name in ("k", "probes"):
            if getattr(self, name) is not None:
                check_count(f"{name}:", getattr(self, name))
        if self.tol is not None:
            check_unit("tol:", self.tol, "[0, 1)")
        if self.weight not in ("probability", "one"):
            raise InputError(f"weight: {shown(self.weight)} is not 'probability' or 'one'")
        if not self.replacement and self.sampler != "model":
            raise InputError(
                f"replacement: False is for sampler 'model', not {shown(self.sampler)}"
            )
        if self.reduction == "batchwise" and self.sampler in ("exact", "sketch"):
            raise InputError(
                f"reduction: 'batchwise' needs an item sampler, not {shown(self.sampler)}"
            )
        settings = dataclasses.replace(self, **self._unused())
        if self.sampler == "sketch" and self.probes is None:
            return dataclasses.replace(settings, probes=_SKETCH_PROBES)
        return settings

    def _unused(self) -> dict[str, Any]:
        """Return what the sampler makes no use of though it was given, as it is when not given."""
        unused = {
            name: standard
            for name, standard in _NOT_GIVEN.items()
            if getattr(self, name) != standard and name not in _USED[self.sampler]
        }
        for name in unused.keys() - {"k"}:  # which those who compare samplers give to all
            log.warning("%s: sampler %r makes no use of it", name, self.sampler)
        return unused

    def _check_positions(self) -> None:
        known = self.positions in ("last", "all") if isinstance(self.positions, str) else False
        if isinstance(self.positions, int) and not isinstance(self.positions, bool):
            known = self.positions >= 1
        if not known:
            raise InputError(
                f"positions: {shown(self.positions)} is not 'last', 'all' or a number of at least 1"
            )
        if self.positions != "last" and self.reduction == "batchwise":
            raise InputError("positions: 'batchwise' takes the last position only")

    def num_sampled(self, num_items: int) -> int:
        """K of a catalogue of `num_items`: as asked for, else 30 or all of a smaller one.

        Raises:
            InputError: More items are asked for than there are.
        """
        if self.k is None:
            return min(_ITEMS, num_items)
        if self.k > num_items and self.sampler in ("topk", "random"):
            raise InputError(f"k: {self.k} items of a catalogue of {num_items} cannot be taken")
        return self.k

    def most_probes(self, width: int | None) -> int:
        """Return the most probes that a factor over `width` dimensions has; None: all logits."""
        asked = {"exact": self.probes, "sketch": self.probes, "target": 1}
        count = asked.get(self.sampler, self.k or _ITEMS)
        return min(count or _MANY_PROBES, width or _MANY_PROBES)

    def meta(self, num_items: int) -> dict[str, Any]:
        """Return what a Fisher's `meta` says of them; None where the sampler does not use one."""
        sampled = self.sampler in ("topk", "model", "random")
        return {
            "sampler": self.sampler,
            "k": self.num_sampled(num_items) if sampled else None,
            "probes": self.probes,
            "reduction": self.reduction,
            "positions": self.positions,
            "seed": self.seed,
            "tol": self.tol,
            "rescale": self.rescale,
            "weight": self.weight if self.sampler == "target" else None,
            "replacement": self.replacement if self.sampler == "model" else None,
        }


def check_chunk(chunk: int | None) -> None:
    """Raise InputError for a number of sequences below 1."""
    if chunk is not None:
        check_count("chunk:", chunk)
