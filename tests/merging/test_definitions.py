"""Fishers that are averages of other things are not merged by, in memory and as files."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import NUM_ITEMS, shaken

import fisherkern as fk
from fisherkern.errors import InputError

LOADER = [torch.arange(1, 7).view(2, 3) % NUM_ITEMS + 1]


def members() -> list[fk.SASRec]:
    return [shaken(fk.SASRec(NUM_ITEMS, max_len=3, dim=4, heads=1, layers=1)) for _ in range(2)]


def fishers(models: list[fk.SASRec], one: dict[str, Any], other: dict[str, Any]) -> list[Any]:
    return [
        fk.diag_fisher(model, LOADER, progress=False, **own)
        for model, own in zip(models, (one, other), strict=True)
    ]


OTHERS = {
    "reduction": ({}, {"reduction": "batchwise"}),
    "positions": ({"positions": "all"}, {"positions": "last"}),
    "some positions": ({}, {"positions": 2}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_definitions_are_refused(name: str, tmp_path: Path) -> None:
    models = members()
    made = fishers(models, *OTHERS[name])
    with pytest.raises(InputError, match=r"the Fisher of member 1 has (reduction|positions)="):
        fk.merge(models, fishers=made)
    for i, (model, fisher) in enumerate(zip(models, made, strict=True)):
        fk.save_model(model, tmp_path / f"m{i}.safetensors")
        fisher.save(tmp_path / f"f{i}.safetensors")
    files = [[tmp_path / f"{kind}{i}.safetensors" for i in range(2)] for kind in "mf"]
    with pytest.raises(InputError, match=r"f1\.safetensors has (reduction|positions)="):
        fk.merge_files(files[0], fishers=files[1], out=tmp_path / "merged.safetensors")
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"sampler": "topk", "k": 3}, {"sampler": "topk", "k": 5}, "k=5 and .* k=3"),
        ({"sampler": "exact"}, {"sampler": "topk", "k": 3}, "sampler='topk'"),
        ({"positions": "all"}, {"positions": 2}, None),
        ({"sampler": "model", "seed": 0}, {"sampler": "model", "seed": 1}, None),
    ],
)
def test_other_estimates_are_merged_with_a_warning(
    one: dict[str, Any], other: dict[str, Any], message: str | None, caplog: Any
) -> None:
    models = members()
    made = fishers(models, one, other)
    with caplog.at_level(logging.WARNING, logger="fisherkern"):
        fk.merge(models, fishers=made)
    if message is None:
        assert not caplog.records
    else:
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert re.search(message, caplog.text)
