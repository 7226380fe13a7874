"""Folders of `torch.distributed.checkpoint` merge as the same tensors in files do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import NUM_ITEMS, shaken

import fisherkern as fk

SUFFIXES = (".safetensors", ".dcp")


def members(folder: Path, suffix: str, other: bool = False) -> list[Path]:
    """Two models; with `other`, the second one's items are other ones in another order."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(0)
        model: Any = shaken(fk.SASRec(NUM_ITEMS, max_len=6, dim=6, heads=2, layers=1), seed)
        shift = 3 if other and seed else 0
        model.item_ids = [f"item {(v * 7) % NUM_ITEMS + shift}" for v in range(NUM_ITEMS)]
        found.append(folder / f"{seed}{suffix}")
        fk.save_model(model, found[-1])
    return found


def fishers(folder: Path, suffix: str) -> list[Path]:
    found = []
    history = torch.randint(1, NUM_ITEMS + 1, (4, 6), generator=torch.Generator().manual_seed(0))
    for seed in (0, 1):
        model = fk.load_model(folder / f"{seed}.safetensors")
        fisher = fk.diag_fisher(model, [history], sampler="topk", k=2, progress=False)
        found.append(folder / f"{seed}.fisher{suffix}")
        fisher.save(found[-1])
    return found


@pytest.mark.parametrize(("method", "other"), [("fisher", True), ("ties", False)])
def test_folders_merge_as_files_do(method: str, other: bool, tmp_path: Path) -> None:
    merged = []
    for suffix in SUFFIXES:
        paths = members(tmp_path, suffix, other)
        given: dict[str, Any] = {"method": method}
        if method == "fisher":
            given["fishers"] = fishers(tmp_path, suffix)
        if method == "ties":
            given["base"] = paths[0]
        for kind in SUFFIXES:
            out = tmp_path / f"merged{suffix}{kind}"
            fk.merge_files(paths, out, **given)
            merged.append(fk.load_model(out))
    for model in merged[1:]:
        assert model.item_ids == merged[0].item_ids
        for name, value in merged[0].state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_folder_is_replaced_and_says_how_it_came_about(tmp_path: Path) -> None:
    paths = members(tmp_path, ".dcp")
    out = tmp_path / "merged.dcp"
    for _ in range(2):
        provenance = fk.merge_files(paths, out)
    about = json.loads((out / "fisherkern.json").read_text())
    assert about["merge"] == provenance and provenance["members"][0]["file"] == "0.dcp"
    assert "merged from 2 members" in (out / "README.md").read_text()
    notes = tmp_path / "notes.dcp"
    notes.mkdir()
    with pytest.raises(fk.InputError, match="is there, and no folder"):
        fk.merge_files(paths, notes)
    (paths[1] / "__0_0.distcp").unlink()
    with pytest.raises(fk.InputError, match="the shard is missing"):
        fk.merge_files(paths, tmp_path / "again.dcp")
    assert not (tmp_path / "again.dcp").exists()
