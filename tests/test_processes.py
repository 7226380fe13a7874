"""Several gloo processes on this machine: the result of one, and one clear line for what fails."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import NUM_ITEMS, shaken
from torch import nn

import fisherkern as fk
from fisherkern.processes import own_part


def model(tied: bool = True) -> fk.SASRec:
    torch.manual_seed(0)
    return shaken(fk.SASRec(NUM_ITEMS, max_len=6, dim=6, heads=2, layers=1, tied=tied))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for size in (7, 1, 5):
        ids = torch.randint(1, NUM_ITEMS + 1, (size, 6), generator=generator)
        for row, padding in zip(
            ids, torch.randint(0, 5, (size,), generator=generator), strict=True
        ):
            row[:padding] = 0
        found.append(ids)
    return found


SETTINGS: list[dict[str, Any]] = [
    {"sampler": "exact"},
    {"sampler": "sketch", "probes": 3},
    {"sampler": "topk", "k": 4},
    {"sampler": "model", "k": 3, "positions": "all"},
]


FAULTS = {"seed": "settings: process", "loader": "loader: process", "nan": "hold a NaN"}


def _given(fault: str, rank: int) -> tuple[nn.Module, list[torch.Tensor], dict[str, Any]]:
    """The arguments of a process, with a fault in them."""
    network, own, settings = model(), batches(), {"sampler": "topk", "k": 4}
    if fault == "seed":
        settings["seed"] = rank
    elif fault == "loader" and rank == 1:
        own = own[:2]
    elif fault == "nan":
        own[1][:] = NUM_ITEMS
        with torch.no_grad():
            network.item_embedding.weight[NUM_ITEMS] = torch.nan
    elif fault == "killed" and rank == 1:
        network.encode = lambda batch: os.kill(os.getpid(), signal.SIGKILL)
    return network, own, settings


def _process(rank: int, folder: str, work: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    if work == "fishers":
        for number, settings in enumerate(SETTINGS):
            fisher = fk.diag_fisher(model(), batches(), progress=False, **settings)
            fisher.save(Path(folder) / f"{number}-{rank}.safetensors")
    for fault in FAULTS if work == "fishers" else ("killed",):
        network, own, settings = _given(fault, rank)
        try:
            fk.diag_fisher(network, own, progress=False, **settings)
        except fk.InputError as error:
            (Path(folder) / f"{fault}-{rank}.txt").write_text(str(error))
    if work == "fishers":
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every setting and every fault."""
    return _run(tmp_path_factory.mktemp("processes"), "fishers")


def _run(folder: Path, work: str) -> Path:
    context = mp.get_context("spawn")
    started = [context.Process(target=_process, args=(rank, str(folder), work)) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
        assert process.exitcode is not None
    return folder


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=lambda i: SETTINGS[i]["sampler"])
def test_processes_together_have_the_fisher_of_one(folder: Path, number: int) -> None:
    alone = fk.diag_fisher(model(), batches(), progress=False, **SETTINGS[number])
    first, second = (fk.DiagFisher.load(folder / f"{number}-{rank}.safetensors") for rank in (0, 1))
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-14)
    assert first.meta == second.meta
    for key in ("num_sequences", "num_positions", "k", "probes"):
        assert first.meta[key] == alone.meta[key]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_differs_or_fails_ends_in_one_line_on_all(folder: Path, fault: str) -> None:
    for rank in (0, 1):
        assert FAULTS[fault] in (folder / f"{fault}-{rank}.txt").read_text()


def test_a_process_that_dies_ends_the_others_in_one_line(tmp_path: Path) -> None:
    _run(tmp_path, "killed")
    assert "another process ended" in (tmp_path / "killed-0.txt").read_text()
    assert not (tmp_path / "killed-1.txt").exists()


def test_shares_are_neighbours_and_of_alike_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.tensor([1, 9, 1, 1, 1, 1, 5, 3])
    for world in (1, 2, 3, 5):
        monkeypatch.setattr("fisherkern.processes.world", lambda world=world: world)
        parts = []
        for rank in range(world):
            monkeypatch.setattr("fisherkern.processes.rank", lambda rank=rank: rank)
            parts.append(list(range(8))[own_part(3, lengths)])
        assert sorted(index for part in parts for index in part) == list(range(8))
        assert max(int(lengths[part].sum()) for part in parts) <= 22 / world + 9
