"""What every process checks of folders and ranks of sharded tables."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as checkpointing
from models import NUM_ITEMS, shaken
from sharded_models import batches, refused, sasrec, sharded, whole
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fisherkern as fk
from fisherkern import processes

# Where checks may write.
FOLDER: list[str] = []


def check_folders(mesh: Any) -> None:
    """Models and Fishers in folders, read by as many processes, by one, and by torch itself."""
    folder = Path(FOLDER[0])
    model: Any = sasrec()
    model.item_ids = [f"item {v}" for v in range(NUM_ITEMS)]
    settings = {"sampler": "topk", "k": 4, "progress": False}
    fisher = fk.diag_fisher(sharded(model, mesh), batches(), **settings)
    with refused("go into a folder, x.dcp"):
        fisher.save(folder / "fisher.safetensors")
    for _ in range(2):  # the second in the place of the first
        fisher.save(folder / "fisher.dcp")
        fk.save_model(model, folder / "model.dcp")
    found = fk.load_model(folder / "model.dcp", mesh)
    assert found.item_ids == model.item_ids and not found.training
    again = fk.diag_fisher(found.double(), batches(), **settings)
    assert again.meta["fingerprint"] == fisher.meta["fingerprint"]
    read = (
        fk.DiagFisher.load(folder / "fisher.dcp", mesh),
        fk.DiagFisher.load(folder / "fisher.dcp"),
    )
    assert read[0].meta == read[1].meta == json.loads(json.dumps(fisher.meta))
    for name, value in fisher.items():
        assert isinstance(read[0][name], DTensor) == isinstance(value, DTensor)
        for other in (again[name], read[0][name], read[1][name]):
            assert torch.equal(whole(other), whole(value))
    with refused("lies over several processes; save_model writes folders"):
        fk.merge([model, model])
    # Another library's folder, of tensors that lie otherwise, through torch's own writer.
    other: Any = sharded(sasrec(), mesh)
    inner: Any = other.blocks[0].feed_forward.inner
    inner.weight = nn.Parameter(distribute_tensor(inner.weight.detach(), mesh, [Shard(1)]))
    checkpointing.save({"model": other.state_dict(), "step": 3}, checkpoint_id=folder / "theirs")
    fresh: Any = sharded(shaken(sasrec(), 5), mesh)
    blank: Any = shaken(sasrec(), 6)
    for target in (fresh, blank):
        fk.load_dcp(target, folder / "theirs")
        for name, value in other.state_dict().items():
            assert torch.equal(whole(target.state_dict()[name]), whole(value))
    theirs = {name: torch.zeros(value.shape).double() for name, value in fisher.items()}
    checkpointing.load(theirs, checkpoint_id=folder / "fisher.dcp")
    assert all(torch.equal(theirs[name], whole(value)) for name, value in fisher.items())


def check_ranks(mesh: Any) -> None:
    """Every protocol's ranks, of a model in fp64 and of one in fp32 with ties."""
    data = fk.synthetic(num_users=20, num_items=17, seed=0)
    tied: Any = sasrec(17).float()
    with torch.no_grad():
        tied.item_embedding.weight[3:8] = tied.item_embedding.weight[2]
        tied.output_bias.zero_()
    for make in (lambda: sasrec(17), lambda: tied, lambda: sasrec(17, tied=False)):
        every = {"metrics": ("ndcg", "debiased-ndcg", "coverage"), "k": (1, 4, 30)}
        for settings in (
            every,
            {"seen": "keep", "split": "validation", **every},
            {"batch_size": 7},
        ):
            with processes.alone():
                one = fk.evaluate(copy.deepcopy(make()), data, **settings)
            many = fk.evaluate(sharded(copy.deepcopy(make()), mesh), data, **settings)
            assert (one.ranks == many.ranks).all() and dict(one) == dict(many)
    other: Any = sharded(sasrec(items=4), mesh)
    with refused("outside 0..4"):
        fk.evaluate(other, data)
    poisoned: Any = sasrec(17)
    with torch.no_grad():
        poisoned.output_bias[2] = torch.nan
    with refused("a score of user number .* is NaN"):
        fk.evaluate(sharded(poisoned, mesh), data)
    many_items = fk.synthetic(num_users=20, num_items=300, seed=0)
    drawn = {"candidates": "uniform-100"}
    with processes.alone():
        one = fk.evaluate(sasrec(items=300), many_items, **drawn)
    many = fk.evaluate(sharded(sasrec(items=300), mesh), many_items, **drawn)
    assert (one.ranks == many.ranks).all()
