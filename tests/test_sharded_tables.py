"""Item tables by rows over 2 and 4 gloo processes: the Fisher of one, and one line for faults."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sharded_checks import (
    check_bits,
    check_brute_force,
    check_case,
    check_faults,
    check_fully_sharded,
    check_gathered,
    check_given,
    check_table,
)
from sharded_files import FOLDER, check_folders, check_ranks
from sharded_models import CASES, OF_FOUR, batches, sasrec, sharded
from torch.distributed.device_mesh import init_device_mesh

import fisherkern as fk

CHECKS: dict[str, Callable[[Any], None]] = {
    "the same bits": check_bits,
    "brute force": check_brute_force,
    "tables": check_table,
    "functions given": check_given,
    "gathered": check_gathered,
    "FSDP2": check_fully_sharded,
    "folders": check_folders,
    "ranks": check_ranks,
    "faults": check_faults,
}
NAMES = {
    2: [*CASES, *CHECKS],
    4: [*OF_FOUR, "the same bits", "tables", "folders", "ranks", "faults"],
}


def _process(rank: int, world: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    FOLDER.append(folder)
    said = {}
    for name in names:
        try:
            if name == "killed":
                _killed(rank, mesh)
            elif name in CASES:
                check_case(name, mesh)
            else:
                CHECKS[name](mesh)
            said[name] = ""
        except AssertionError:
            said[name] = traceback.format_exc()  # the same in all
        except BaseException as error:
            said[name] = traceback.format_exc()
            if name == "killed":
                said[name] = str(error)
            (Path(folder) / f"{rank}.json").write_text(json.dumps(said))
            os._exit(1)  # the others are out of step
        (Path(folder) / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def _killed(rank: int, mesh: Any) -> None:
    model: Any = sharded(sasrec(), mesh)
    if rank == 1:
        model.encode = lambda batch: os.kill(os.getpid(), signal.SIGKILL)
    fk.diag_fisher(model, batches(), progress=False)


def _run(folder: Path, world: int, names: list[str]) -> list[dict[str, str]]:
    """What the processes say of each check."""
    context = mp.get_context("spawn")
    started = [
        context.Process(target=_process, args=(rank, world, str(folder), names))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
        process.kill()  # one that waits for another that left
    found = []
    for rank in range(world):
        path = folder / f"{rank}.json"
        found.append(json.loads(path.read_text()) if path.exists() else {})
    return found


@pytest.fixture(scope="module", params=[2, 4])
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("shards")
    return request.param, _run(folder, request.param, NAMES[request.param])


@pytest.mark.parametrize("name", [*CASES, *CHECKS])
def test_sharded_tables(said: Any, name: str) -> None:
    world, found = said
    if name not in NAMES[world]:
        pytest.skip("of 2 processes only")
    for rank, own in enumerate(found):
        assert own.get(name, "it never came to that") == "", (rank, own.get(name))


def test_a_process_that_dies_ends_the_others_in_one_line(tmp_path: Path) -> None:
    found = _run(tmp_path, 2, ["killed"])
    assert "another process ended" in found[0]["killed"] and "\n" not in found[0]["killed"]
