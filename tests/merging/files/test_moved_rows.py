"""Rows in other orders: copied once in large pieces, found where a loop finds them."""

import os

import pytest
import safetensors.torch
import torch
from helpers.merging_files import saved, saved_fisher

from fisherkern.errors import InputError
from fisherkern.members.catalogue import ItemRows
from fisherkern.merging.files import moved_rows, streaming, tensor_files
from fisherkern.merging.files.moved_rows import RowReaders
from fisherkern.merging.files.streaming import merge_files
from fisherkern.merging.merge import merge
from fisherkern.training import load_model


@pytest.fixture
def always_dealt(monkeypatch):
    monkeypatch.setattr(moved_rows, "_is_scattered", lambda *arguments: True)
    monkeypatch.setattr(moved_rows, "DEALT", 70)
    monkeypatch.setattr(moved_rows, "GATHERED", 300)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F64"])
@pytest.mark.parametrize("part", [slice(0, 23), slice(6, 18), slice(21, 23), slice(3, 3)], ids=str)
def test_every_row_is_where_a_loop_finds_it(part, kind, tmp_path, always_dealt, monkeypatch):
    """Two padding rows, 17 items of which the result has 20, one row behind; in pieces of 7."""
    if kind == "F64":
        monkeypatch.setattr(moved_rows, "GATHERED", 1)  # a window is one block
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(20, 3, generator=generator).to(tensor_files.TYPES[kind])
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": table}, path)
    positions = torch.full((20,), -1, dtype=torch.int32)
    positions[torch.randperm(20, generator=generator)[:13]] = torch.randperm(
        17, generator=generator
    )[:13].int()
    expected = torch.zeros(23, 3, dtype=table.dtype)
    for row in range(23):
        if row < 2:
            expected[row] = table[row]
        elif row == 22:
            expected[row] = table[19]
        elif positions[row - 2] >= 0:
            expected[row] = table[2 + positions[row - 2]]
    rows = ItemRows(positions, first=2, size=17, after=1)
    with tensor_files.opened([path]) as ((file,),):
        with RowReaders([file], ["x"], [rows], part, 3, tmp_path) as readers:
            assert readers._dealt
            for start in range(part.start, part.stop, 3):
                stop = min(start + 3, part.stop)
                assert torch.equal(readers.read(start, stop)[0], expected[start:stop])
    assert [own.name for own in tmp_path.iterdir()] == ["x.safetensors"]


IDS = ("abcdefghijk", "kxacbfyed", "zyjihgfedcbaw", "jibgxazkq")


@pytest.mark.parametrize("method", ["fisher", "task_arithmetic", "ties"])
def test_the_merge_is_that_in_memory_to_the_last_bit(method, tmp_path, always_dealt, monkeypatch):
    from fisherkern.merging import blocks

    monkeypatch.setattr(blocks, "BLOCK", 50)
    monkeypatch.setattr(streaming, "READ", 80)
    found = [saved(tmp_path, n, ids=ids) for n, ids in enumerate(IDS)]
    models = [load_model(path) for path, _ in found]
    given, held = {"method": method}, {"method": method}
    if method == "fisher":
        fishers = [saved_fisher(tmp_path, n, models[n]) for n in range(3)]
        given["fishers"], held["fishers"] = zip(*fishers, strict=True)
    else:
        given["base"], held["base"] = found[3][0], models[3]
    out = tmp_path / "out" / "merged.safetensors"
    merge_files([path for path, _ in found[:3]], out, **given)
    expected, merged = merge(models[:3], **held), load_model(out)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name
    assert len(list(out.parent.iterdir())) == 3


def test_long_runs_are_read_in_place_and_mixed_rows_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(moved_rows, "SMALL", 0)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(50_000, 128)}, path)
    mixed = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    runs = torch.arange(50_000).roll(20_000)
    with tensor_files.opened([path]) as ((file,),):
        for positions, dealt in ((mixed, True), (runs, False)):
            rows = ItemRows(positions, 0, 50_000, 0)
            readers = RowReaders([file], ["x"], [rows], slice(0, 50_000), 512, tmp_path)
            with readers:
                assert bool(readers._dealt) == dealt


def test_a_disk_too_small_for_the_copy_leaves_nothing(tmp_path, always_dealt, monkeypatch):
    paths = [saved(tmp_path, n, ids=ids)[0] for n, ids in enumerate(IDS[:2])]
    before = sorted(own.name for own in tmp_path.iterdir())

    def full(handle, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="out.safetensors: could not be written: No space left"):
        merge_files(paths, tmp_path / "out.safetensors")
    assert sorted(own.name for own in tmp_path.iterdir()) == before
