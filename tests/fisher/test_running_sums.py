"""Sums of many batches: no batch is rounded to the units of all of them."""

from __future__ import annotations

import pytest
import torch

from fisherkern.fisher import running_sums
from fisherkern.fisher.running_sums import RunningSums


@pytest.mark.parametrize(("size", "error"), [(1, 0.0), (4, 5e-8), (64, 5e-6)])
def test_batches_are_added_up_in_float64(
    size: int, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every batch, after every second one, or in fp32: 2^24 + 1 is no fp32 number."""
    monkeypatch.setattr(running_sums, "_EVERY_BATCH", 2)
    monkeypatch.setattr(running_sums, "_MOST", 32)
    sums = RunningSums({"a": torch.zeros(size), "b": torch.zeros(2, dtype=torch.float64)})
    for batch in [2.0**24, *[0.75] * 99]:
        sums.recent["a"] += batch
        sums.recent["b"] += batch
        sums.end_batch()
    for name in ("a", "b"):
        total = sums.total(name)
        expected = torch.full_like(total, 2.0**24 + 99 * 0.75, dtype=torch.float64)
        assert float((total / expected - 1).abs().max()) <= (error if name == "a" else 0.0)
        assert torch.equal(sums.total(name), total)  # asked for twice, counted once
    assert sums.total("a").dtype == (torch.float64 if size <= 32 else torch.float32)


def test_a_few_batches_are_left_where_they_are() -> None:
    sums = RunningSums({"a": torch.zeros(running_sums._EVERY_BATCH * 2)})
    sums.recent["a"] += 1
    sums.end_batch()
    assert sums.total("a") is sums.recent["a"]
    sums.end_batch()
    assert sums.total("a").dtype == torch.float64 and float(sums.total("a")[0]) == 1.0
