"""pytest-benchmark over the small cases; no part of the tests' default run."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.speed.small_cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_time(benchmark: Any, name: str) -> None:
    benchmark(CASES[name]())
