"""Folders that 2 processes wrote, read by 1, 2 and 4; and one line for what cannot be read."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpointing
from models import shaken
from process_runs import join, start
from sharded_models import batches, refused, sasrec, sharded, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import fisherkern as fk
from fisherkern import processes
from fisherkern.adapters.sharded import dcp

TOPK: dict[str, Any] = {"sampler": "topk", "k": 4, "progress": False}
ITEMS = 17
DATA = fk.synthetic(num_users=20, num_items=ITEMS, seed=0)


def member(seed: int) -> nn.Module:
    model: Any = shaken(sasrec(ITEMS), seed, 0.1)
    model.item_ids = list(DATA.item_ids)
    return model


def write(rank: int, world: int, folder: Path) -> None:
    """Two members and their Fishers, and one member as torch alone writes it."""
    join(folder, rank, world)
    mesh = init_device_mesh("cpu", (world,))
    for seed in (1, 2):
        model: Any = sharded(member(seed), mesh)
        fk.save_model(model, folder / f"m{seed}.dcp")
        fk.diag_fisher(model, batches(ITEMS), **TOPK).save(folder / f"f{seed}.dcp")
    checkpointing.save({"model": model.state_dict()}, checkpoint_id=folder / "theirs")
    dist.destroy_process_group()


def read(rank: int, world: int, folder: Path) -> None:
    join(folder, rank, world)
    mesh = init_device_mesh("cpu", (world,))
    expected: Any = member(2)
    found: Any = fk.load_model(folder / "m2.dcp", mesh).double()
    theirs: Any = sharded(member(3), mesh)
    fk.load_dcp(theirs, folder / "theirs")
    for model in (found, theirs):
        assert isinstance(model.item_embedding.weight, DTensor)
        for name, value in expected.state_dict().items():
            assert torch.equal(whole(model.state_dict()[name]), value), name
    fisher = fk.DiagFisher.load(folder / "f2.dcp", mesh)
    for name, value in fk.diag_fisher(found, batches(ITEMS), **TOPK).items():
        assert torch.allclose(whole(fisher[name]), whole(value), rtol=1e-11, atol=1e-14), name
    with processes.alone():
        one = fk.evaluate(expected, DATA)
    assert (fk.evaluate(found, DATA).ranks == one.ranks).all()
    paths, fishers = ([folder / f"{kind}{n}.dcp" for n in (1, 2)] for kind in "mf")
    out = folder / f"merged-{world}.dcp"
    fk.merge_files(paths, out, fishers=fishers, check_fingerprint=False)
    shutil.copytree(paths[0], folder / f"cut-{world}.dcp", dirs_exist_ok=True)
    dist.barrier()
    if rank == 0:
        shard = folder / f"cut-{world}.dcp" / "__1_0.distcp"
        os.truncate(shard, shard.stat().st_size - 9)
    dist.barrier()
    for sentence in ("__1_0.distcp: the shard is cut short", "__1_0.distcp: the shard is missing"):
        with refused(sentence):
            fk.load_model(folder / f"cut-{world}.dcp", mesh)
        with refused(sentence):
            fk.merge_files([paths[0], folder / f"cut-{world}.dcp"], folder / "none.dcp")
        dist.barrier()
        (folder / f"cut-{world}.dcp" / "__1_0.distcp").unlink(missing_ok=True)
        dist.barrier()
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        with refused("mesh: has 2 dimensions"):
            fk.load_model(paths[0], square)
        half: Any = fk.load_model(paths[0], square["a"]).double()
        with refused("mesh of 2 processes, and 4 work together"):
            fk.diag_fisher(half, batches(ITEMS), **TOPK)
        with refused("mesh of 2 processes, and 4 work together"):
            fk.evaluate(half, DATA)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    assert start(2, write, folder) == [0, 0]
    (folder / "store-2").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("world", [1, 2, 4])
def test_folders_of_two_processes_are_read_by(world: int, folder: Path) -> None:
    assert start(world, read, folder) == [0] * world
    members = [fk.load_model(folder / f"m{n}.dcp") for n in (1, 2)]
    fishers = [fk.DiagFisher.load(folder / f"f{n}.dcp") for n in (1, 2)]
    expected = fk.merge(members, fishers=fishers, check_fingerprint=False).state_dict()
    merged = fk.load_model(folder / f"merged-{world}.dcp")
    assert merged.item_ids == member(1).item_ids
    for name, value in merged.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert not (folder / "none.dcp").exists() and not list(folder.glob(".*"))


def killed(rank: int, world: int, folder: Path) -> None:
    """In the middle of a second writing, of another member to the same place."""
    join(folder, rank, world)
    mesh = init_device_mesh("cpu", (world,))
    fk.save_model(sharded(member(1), mesh), folder / "x.dcp")
    if rank == 1:
        dcp._write = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
    for what in ("save", "merge"):
        with contextlib.suppress(fk.InputError):
            try:
                if what == "save":
                    fk.save_model(sharded(member(2), mesh), folder / "x.dcp")
                else:
                    fk.merge_files([folder / "x.dcp"] * 2, folder / "y.dcp")
            except fk.InputError as error:
                (folder / f"{what}.txt").write_text(str(error))
                raise


def test_a_process_killed_while_it_writes_leaves_the_old_folder(tmp_path: Path) -> None:
    assert start(2, killed, tmp_path) == [0, -signal.SIGKILL]
    for what in ("save", "merge"):
        said = (tmp_path / f"{what}.txt").read_text()
        assert "\n" not in said and said
    assert sorted(p.name for p in tmp_path.glob("*.dcp")) == ["x.dcp"]
    found = fk.load_model(tmp_path / "x.dcp").state_dict()
    for name, value in member(1).state_dict().items():
        assert torch.equal(found[name], value), name
    assert not list(tmp_path.glob(".*"))
