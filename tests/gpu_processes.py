"""Sharded item tables on GPUs: torchrun --standalone --nproc-per-node gpu tests/gpu_processes.py

One process for each GPU, joined by NCCL. It prints a line of JSON for each case: the largest
difference of a Fisher from sharded tables and from whole ones, as a share of its tensor's largest
entry, and whether ranks are equal. Its status is 1 where a case failed. Not part of the suite.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch
import torch.distributed as dist
from sharded_models import CASES, loader_of, sharded, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fisherkern as fk
from fisherkern import processes

MOST = 1e-10


def moved(batches: list[Any], device: torch.device) -> list[Any]:
    """The batches on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return {name: tensor.to(device) for name, tensor in value.items()}

    return [move(batch) for batch in batches]


def difference(name: str, mesh: Any, device: torch.device) -> dict[str, float]:
    """The largest difference of a case's Fishers by its settings."""
    make, samplers = CASES[name]
    found = {}
    for settings in samplers:
        model: nn.Module = make().to(device)
        batches = moved(loader_of(model), device)
        with processes.alone():
            one = fk.diag_fisher(model, batches, progress=False, **settings)
        many = fk.diag_fisher(sharded(make().to(device), mesh), batches, progress=False, **settings)
        shares = [
            float((whole(many[key]) - value).abs().max() / value.max().clamp(min=1e-18))
            for key, value in one.items()
        ]
        found[json.dumps(settings)] = max(shares)
    return found


def equal_ranks(mesh: Any, device: torch.device) -> bool:
    """Whether a sharded and a whole model rank alike."""
    data = fk.synthetic(200, 100)
    torch.manual_seed(0)
    model = fk.SASRec(data.num_items, max_len=20, dim=16, heads=2, layers=1).to(device)
    with processes.alone():
        one = fk.evaluate(model, data)
    return bool((one.ranks == fk.evaluate(sharded(model, mesh), data).ranks).all())


def main() -> int:
    """Check all cases; 0, or 1 where one failed."""
    dist.init_process_group("cpu:gloo,cuda:nccl")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    failed = 0
    for name in [*CASES, "ranks"]:
        line: dict[str, Any] = {"case": name, "processes": dist.get_world_size()}
        try:
            if name == "ranks":
                line["equal"] = equal_ranks(mesh, device)
                right = line["equal"]
            else:
                line["differences"] = difference(name, mesh, device)
                # A key's bias has no Fisher but what rounding leaves; NaN is no difference.
                right = all(share <= MOST for share in line["differences"].values())
        except Exception:
            line["error"], right = traceback.format_exc()[-600:], False
        failed += not right
        if dist.get_rank() == 0:
            print(json.dumps({**line, "right": bool(right)}), flush=True)
    dist.destroy_process_group()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
