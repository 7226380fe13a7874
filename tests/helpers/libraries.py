"""What every library's test asks of every architecture: each public function, model as it is."""

from __future__ import annotations

import pytest

from benchmarks.libraries import checks
from benchmarks.libraries.architecture import Architecture, build_all

# Names of other architectures' builders are entered when their files are imported.
ENTRIES = list(build_all().values())


def entries(library: str) -> list[Architecture]:
    """The architectures whose builder imports `library`."""
    return [entry for entry in ENTRIES if entry.library == library]


def name_of(entry: Architecture) -> str:
    return entry.name


class EveryDoor:
    """Tests for a subclass that is parametrised by `entry`."""

    @pytest.mark.parametrize("sampler", ["exact", "topk"])
    def test_the_fisher_is_its_definition(self, entry: Architecture, sampler: str) -> None:
        assert checks.fisher_error(entry, sampler) <= entry.tolerance

    def test_batches_of_every_kind_are_taken(self, entry: Architecture) -> None:
        assert (checks.more_batches_error(entry) or 0) <= entry.tolerance

    def test_the_next_items_are_those_of_the_batch(self, entry: Architecture) -> None:
        assert (checks.targets_error(entry) or 0) <= entry.tolerance

    def test_a_merge_is_the_formula(self, entry: Architecture) -> None:
        assert checks.merge_error(entry) <= 1e-9

    def test_preflight_runs(self, entry: Architecture) -> None:
        checks.preflight_runs(entry)

    def test_ranks_are_those_by_hand(self, entry: Architecture) -> None:
        assert checks.ranks_are_right(entry) in ("right", None)
