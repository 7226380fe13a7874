"""Which parameter is accumulated how, decided from one captured forward pass."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fisherkern.fisher.capture import Parameters, Place, Site, Use, uncaptured
from fisherkern.fisher.rules.uses import Joinable, Lookup

# Elements of per-sequence gradients held at once where a place has several uses.
_TILE_ELEMENTS = 2**24


@dataclasses.dataclass
class Group:
    """All uses of one place: sites by index, and, in the same order, the site and the use."""

    place: Place
    sites: list[int]
    captured: list[Site]
    uses: list[Use]
    _joined: dict[tuple[int, ...], Joinable] = dataclasses.field(default_factory=dict)

    @property
    def lookups_only(self) -> bool:
        return all(isinstance(use, Lookup) for use in self.uses)

    def joined_lookup(self) -> Lookup:
        """All lookups as one over their positions side by side; see `joined_delta`."""
        return Lookup.joined([use for use in self.uses if isinstance(use, Lookup)])

    def joined_delta(self, deltas: Sequence[Tensor | None], probes: int) -> Tensor:
        """The output gradients that belong to `joined_lookup`, (R, N, T, D)."""
        parts = []
        for index, site, use in zip(self.sites, self.captured, self.uses, strict=True):
            assert isinstance(use, Lookup)
            delta = deltas[index]
            shape = probes, *use.ids.shape, use.place.shape[1]
            if delta is None:
                parts.append(torch.zeros(shape, device=use.ids.device))
            else:
                parts.append(use.positions(site.sequences_first(delta)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def add_square_(self, fisher: Tensor, deltas: Sequence[Tensor | None]) -> None:
        """fisher += Σ_r Σ_n (the sum over the uses of their gradients)²; `deltas` by site."""
        numbers, present = [], []
        for number, (index, site) in enumerate(zip(self.sites, self.captured, strict=True)):
            if (delta := deltas[index]) is not None:
                numbers.append(number)
                present.append(site.sequences_first(delta))
        uses = [self.uses[number] for number in numbers]
        if len(uses) == 1:
            uses[0].add_square_(fisher, present[0])
        elif uses and (joined := self._join(tuple(numbers))) is not None:
            parts = [
                use.positions(delta)
                for use, delta in zip(uses, present, strict=True)
                if isinstance(use, Joinable)
            ]
            joined.add_square_(fisher, torch.cat(parts, dim=2))
        elif uses:
            for probe in zip(*present, strict=True):
                self._add_stored_square_(fisher, uses, probe)

    def _add_stored_square_(
        self, fisher: Tensor, uses: Sequence[Use], deltas: Sequence[Tensor]
    ) -> None:
        """The same for one probe and uses that nothing joins: their gradients are stored."""
        n = len(deltas[0])
        step = max(1, _TILE_ELEMENTS // fisher.numel())
        for first in range(0, n, step):
            part = slice(first, min(first + step, n))
            total = fisher.new_zeros(part.stop - first, *fisher.shape)
            for use, delta in zip(uses, deltas, strict=True):
                total += use.per_sequence(delta, part)
            fisher += total.square_().sum(dim=0)

    def _join(self, numbers: tuple[int, ...]) -> Joinable | None:
        """One use of those of the given numbers, kept for the next probe; None if they differ."""
        uses = [self.uses[number] for number in numbers]
        first = uses[0]
        if any(type(use) is not type(first) for use in uses) or not isinstance(first, Joinable):
            return None
        if numbers not in self._joined:
            self._joined[numbers] = first.joined(uses)
        return self._joined[numbers]


@dataclasses.dataclass
class Plan:
    """Groups the rules serve, and the names that need per-sequence autograd."""

    groups: list[Group]
    fallback: set[str]

    def groups_of(self, name: str) -> list[Group]:
        return [group for group in self.groups if group.place.name == name]

    @property
    def reached(self) -> set[str]:
        """Names of the parameters that the result depends on."""
        return {group.place.name for group in self.groups} | self.fallback


def make_plan(
    result: Tensor, sites: Sequence[Site], parameters: Parameters, usable: Sequence[int]
) -> Plan:
    """Group the uses at the usable sites by place; other uses send a name to the fallback.

    `result` (N, ...) is what the probes are applied to; `usable` as `usable_sites` gives it.
    """
    fallback = uncaptured(result, [sites[i] for i in usable], parameters)
    groups: dict[Place, Group] = {}
    for index in usable:
        for use in sites[index].uses:
            group = groups.setdefault(use.place, Group(use.place, [], [], []))
            group.sites.append(index)
            group.captured.append(sites[index])
            group.uses.append(use)
    fallback |= _overlapping(list(groups))
    return Plan([g for g in groups.values() if g.place.name not in fallback], fallback)


def usable_sites(result: Tensor, sites: Sequence[Site]) -> list[int]:
    """Indices of the sites that `result` depends on sequence by sequence, as they are read.

    One backward pass from the first and one from the last sequence: a site that gets no
    gradient is a dead branch; one that gets some in another sequence's place mixes
    sequences, or has something else (time, say) in the dimension read as theirs. Two,
    because time with a single position in use looks like sequences to the one of the
    same number. A call that stands both tests read in two ways is left to the fallback.
    """
    if not sites:
        return []
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(result[0].shape, generator=generator).to(result)
    edges = {site.output.node: site.output for site in sites}
    usable = set(range(len(sites)))
    wrong = []
    for number in sorted({0, len(result) - 1}):
        seed = torch.zeros_like(result)
        seed[number] = direction
        gradients = torch.autograd.grad(
            result, list(edges.values()), seed, retain_graph=True, allow_unused=True
        )
        found = dict(zip(edges, gradients, strict=True))
        for index, site in enumerate(sites):
            delta = found[site.output.node]
            if delta is None:
                usable.discard(index)
                continue
            delta = site.sequences_first(delta[None])[0]
            elsewhere = delta[:number].any() | delta[number + 1 :].any()
            wrong.append((index, elsewhere))
    # All read back at once: a GPU is waited for only here.
    answers = torch.stack([answer for _, answer in wrong]).tolist() if wrong else []
    usable -= {index for (index, _), answer in zip(wrong, answers, strict=True) if answer}
    readings = collections.Counter(sites[index].output.node for index in usable)
    return sorted(index for index in usable if readings[sites[index].output.node] == 1)


def _overlapping(places: Sequence[Place]) -> set[str]:
    """Names with two different places that share entries."""
    found = set()
    spans = sorted((p.name, p.start, p.start + math.prod(p.shape)) for p in places)
    for (name, _, stop), (next_name, start, _) in itertools.pairwise(spans):
        if name == next_name and start < stop:
            found.add(name)
    return found
