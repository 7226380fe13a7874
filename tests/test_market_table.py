"""The README's table of two markets, from stored results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fisherkern as fk
from benchmarks import market_table
from benchmarks.free_table import free_rows


def store(folder: Path, best: str) -> None:
    rows = [
        {
            "model": model,
            "ndcg@10": 0.1 + number / 100,
            "over": {
                "best member": {"model": best, "mean": number / 100 - 0.01, "standard_error": 0.001}
            },
        }
        for number, (_, model) in enumerate(market_table.MODELS)
    ]
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"seeds": [0, 1], "tables": [{"rows": rows}]}))


def test_a_line_for_each_model(tmp_path):
    store(tmp_path / "here", "member 2")
    heads, _, first, second, third, *rest = market_table.market_rows(
        tmp_path, {"Data": "here"}
    ).split("\n")
    assert heads == "| model | Data, NDCG@10 | over market 2 |"
    assert first == "| network of market 1 | 0.1000 | -0.0100 ± 0.0020 |"
    assert second == "| network of market 2 (the better on validation) | 0.1100 |  |"
    assert third == "| plain average of the two | 0.1200 | +0.0100 ± 0.0020 |"
    assert len(rest) == 5 and rest[-1].endswith("; seeds: 2 on Data.")


def test_a_title_that_is_not_true_is_refused(tmp_path):
    store(tmp_path / "here", "member 1")
    with pytest.raises(fk.InputError, match="Data: the best member is member 1, not member 2"):
        market_table.market_rows(tmp_path, {"Data": "here"})


def test_the_better_kinds_of_each_fisher_are_compared(tmp_path: Path) -> None:
    """By their scores on validation, and never by those on test."""
    gap = {"mean": 0.002, "standard_error": 0.001}
    scores = {
        "member 1": (0.1, 0.1),
        "uniform merge": (0.1, 0.11),
        "Fisher merge, exact, floor 0.1": (0.2, 0.12),
        "Fisher merge, exact, floor 1": (0.1, 0.19),
        "Fisher merge, optimizer, floor 0.1": (0.1, 0.18),
        "Fisher merge, optimizer, floor 1": (0.2, 0.13),
    }
    rows = [
        {
            "model": model,
            "validation_ndcg@10": validation,
            "ndcg@10": test,
            "over": {
                "best member": {"model": "member 1", **gap, "mean": test - 0.1},
                "uniform merge": {**gap, "mean": test - 0.11},
                "free Fisher": {**gap, "mean": test - 0.13},
            },
        }
        for model, (validation, test) in scores.items()
    ]
    (tmp_path / "here").mkdir()
    content = json.dumps({"seeds": [0], "tables": [{"rows": rows}]})
    (tmp_path / "here" / "result.json").write_text(content)
    lines = free_rows(tmp_path, [("thirds", "here"), ("absent", "there")]).split("\n")
    cells = "+0.0100 ± 0.0020 | +0.0100 ± 0.0020 | +0.0200 ± 0.0020 | -0.0100 ± 0.0020"
    assert lines[2:] == [f"| thirds | 1 | 0.1000 | {cells} |"]
