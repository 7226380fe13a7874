"""The settings of the Fisher paper's tables: starts, figures, presets, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

import fisherkern as fk
from benchmarks.experiments import TABLES, Paper
from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.candidates import Candidates, chance
from benchmarks.experiments.contrastive import EXTRA, MEMBERS
from fisherkern.fingerprint import fingerprint


@pytest.fixture(scope="module")
def small(make_data: Callable[[int, int], str]) -> str:
    return make_data(50, 180)


def test_chance_by_hand() -> None:
    assert chance() == pytest.approx(sum(1 / math.log2(1 + r) for r in range(1, 11)) / 101)


def cache_of(small: str, tmp_path: Path, seed: int = 0) -> ArtifactCache:
    return ArtifactCache(fk.load(small), tmp_path, seed, None, None, 10, False)


def test_members_of_table1_start_apart_or_together(small: str, tmp_path: Path) -> None:
    own = cache_of(small, tmp_path)
    for shared in (False, True):
        experiment = TABLES["table1"].on(small, shared_start=shared, max_len=8, dim=8)
        starts = {fingerprint(experiment.start(own, number)) for number in (1, 2, 3, 4, 8)}
        assert len(starts) == (1 if shared else 5)
        rows = experiment.rows(own)
        assert "base" not in rows and ("TIES" in rows) == shared
        origin = experiment.origin(own)
        assert (origin is None) == (not shared) and (
            origin is None or starts == {fingerprint(origin())}
        )


def test_the_papers_figures_stand_in_their_tables_on_ml_1m_alone(
    small: str, tmp_path: Path
) -> None:
    own = cache_of(small, tmp_path)
    known = {
        "table1": {MEMBERS[1]: ".0585", MEMBERS[3]: ".0933"},
        "table2": {},
        "samplers": {},
    }
    merged = {"table1": ".1289", "table2": ".1386"}
    for name, figures in known.items():
        for settings in ({}, {"top_k": 10}, {"extra_epochs": 0}):
            experiment = TABLES[name].on("ml-1m", **settings)
            expected, note = experiment.paper()
            if name in merged:
                row = f"Fisher merge, topk {settings.get('top_k', 30)}, floor 0.1"
                row += "" if settings.get("extra_epochs") == 0 else EXTRA
                figures = {**known[name], row: merged[name]}
            assert dict(expected) == figures and note
            assert set(figures) <= experiment.rows(own).keys()
        assert TABLES[name].on("beauty").paper() == ({}, "")
    experiments = Paper.on("ml-1m").table1(), Paper.on("beauty").table1()
    notes = [Candidates(e, {}, []).paper()[1] for e in experiments]
    assert ".0419" in notes[0] and notes[1] == ""


def test_presets_reach_the_parts() -> None:
    beauty = Paper.on("beauty", scratch_epochs=7, floor=0.5)
    assert (beauty.table1().member_epochs, beauty.table2().member_epochs) == (7, 15)
    assert (beauty.table2().base_epochs, beauty.samplers().floor) == (40, 0.5)
    assert (beauty.table1().max_len, beauty.table1().dropout) == (20, 0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paper", "--by", "time"], "unrecognized arguments: --by time"),
        (["paper", "--seeds", "0"], "--seeds: must be at least 1, got 0"),
        (["paper", "--time-limit", "-1"], "time_limit: must not be negative, got -1"),
        (["paper", "--floor", "-0.1"], "floor: must not be negative, got -0.1"),
        (["paper", "--similarity", "l2"], "similarity must be 'dot' or 'cosine', got 'l2'"),
        (["paper", "--scratch-epochs", "0"], "scratch_epochs: must be at least 1, got 0"),
        (["paper", "--base", "none.safetensors"], "none.safetensors: no such file"),
        (["table1", "--base", "x"], "base: every member of table1 starts from scratch"),
        (["table1", "--base-epochs", "3"], "unrecognized arguments: --base-epochs 3"),
        (["table2", "--temperature", "0"], "temperature must be positive and finite, got 0"),
        (["samplers", "--floor", "nan"], "floor: must not be negative, got nan"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, assert_refused: Callable[[list[str], str], None]
) -> None:
    assert_refused(arguments, message)
