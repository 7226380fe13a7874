"""Several gloo processes on this machine: the result of one, and one clear line for what fails."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from process_runs import DATA, FP64, PARTS, Found, batches, everything, join, member, ndcg, start
from torch import Tensor, nn

import fisherkern as fk
from fisherkern import processes
from fisherkern.files import read_tensors

CASES = [(world, number) for world in PARTS for number in range(len(PARTS[world]))]
# Entries of a tensor may differ by this share of its largest.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two and what four processes made of everything."""
    folder = tmp_path_factory.mktemp("processes")
    for world in PARTS:
        assert start(world, everything, folder) == [0] * world
    return folder


@functools.cache
def by_one(part: Callable[[torch.dtype], Found], dtype: torch.dtype) -> Found:
    return part(dtype)


def named(case: tuple[int, int]) -> str:
    part, dtype = PARTS[case[0]][case[1]]
    return f"{case[0]}-{part.__name__}-{dtype}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_processes_have_the_result_of_one(folder: Path, case: tuple[int, int]) -> None:
    world, number = case
    part, dtype = PARTS[world][number]
    files = [folder / f"{world}-{number}-{rank}.safetensors" for rank in range(world)]
    assert len({file.read_bytes() for file in files}) == 1
    tensors, about = read_tensors(files[0])
    expected, expected_about = by_one(part, dtype)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        if part.__name__ == "reports" or not value.is_floating_point():
            assert torch.equal(tensors[name], value), name
        else:
            bound = TOLERANCE[dtype] * float(value.abs().max())
            assert float((tensors[name] - value).abs().max()) <= bound, name
    assert rounded(about) == rounded(expected_about)


def rounded(value: object) -> object:
    """JSON values with as many digits as rounding leaves."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): rounded(own) for key, own in value.items()}
    return [rounded(own) for own in value] if isinstance(value, list | tuple) else value


def test_processes_repeat_their_bits(folder: Path) -> None:
    first: dict[tuple[str, torch.dtype], bytes] = {}
    repeated = 0
    for number, (part, dtype) in enumerate(PARTS[2]):
        found = (folder / f"2-{number}-0.safetensors").read_bytes()
        repeated += (part.__name__, dtype) in first
        assert first.setdefault((part.__name__, dtype), found) == found
    assert repeated == 2


def fisher(rank: int) -> object:
    return fk.diag_fisher(member(1), batches(), sampler="topk", k=4, progress=False)


class Broken(nn.Module):
    """Popularity, but where `fails` says of the number of a call that it ends otherwise."""

    first_item = 1

    def __init__(self, fails: Callable[[int], None]) -> None:
        super().__init__()
        self.fails, self.calls = fails, 0

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        self.fails(self.calls)
        scores = torch.from_numpy(DATA.popularity()).double()
        return scores.expand(len(batch["history"]), -1)


def evaluate(rank: int) -> object:
    return fk.evaluate(member(1), DATA, batch_size=9)


def seed(rank: int) -> object:
    return fk.diag_fisher(member(1), batches(), seed=rank, progress=False)


def loader(rank: int) -> object:
    return fk.linear_grams(member(1), list(batches())[: 3 - rank], progress=False)


def weights(rank: int) -> object:
    return fk.evaluate(member(1 + rank), DATA)


def data(rank: int) -> object:
    own = DATA.subset(range(40 - rank))
    return fk.evaluate(member(1), own)


def nan(rank: int) -> object:
    model = member(1)
    with torch.no_grad():
        model.item_embedding.weight[DATA.num_items] = torch.nan
    own = [batch["history"] for batch in batches()]
    own[1][:] = DATA.num_items
    return fk.diag_fisher(model, own, sampler="topk", k=4, progress=False)


def one_breaks(rank: int) -> object:
    def fails(call: int) -> None:
        if rank == 1 and call == 2:
            raise ValueError("a fault of the model's")

    return fk.evaluate(Broken(fails), DATA, batch_size=5)


def score(rank: int) -> object:
    members = [member(1), member(2)]
    return fk.preflight(members, score=lambda model: ndcg(model) + rank * 1e-3)


def score_breaks(rank: int) -> object:
    """In one process before the evaluation that all begin, inside which the others wait."""

    def breaks(model: nn.Module) -> float:
        if rank == 0:
            raise KeyError("no score")
        return ndcg(model)

    return fk.merge([member(1), member(2)], method="weighted", weights="search", score=breaks)


def members(rank: int) -> object:
    own = [member(1), member(2 + rank)]
    return fk.merge(own, method="learned_soup", validation=batches("validation"))


def histories(rank: int) -> object:
    own = list(batches())[rank:]
    return fk.align([member(1), member(2)], by="activations", loader=own)


def call(rank: int) -> object:
    return fisher(rank) if rank else evaluate(rank)


def code(rank: int) -> object:
    before = processes.source_sha256
    processes.source_sha256 = lambda: str(rank)  # another checkout on another machine
    try:
        return evaluate(rank)
    finally:
        processes.source_sha256 = before


FAULTS = {
    seed: "settings: process",
    loader: "loader: process",
    weights: "model: process",
    data: "protocol: process",
    nan: "hold a NaN",
    one_breaks: "a fault of the model's",
    score: "the score of member 0: process",
    score_breaks: "no score",
    members: "what is merged: process",
    histories: "loader: process",
    call: "the call: process",
    code: "the code of fisherkern: process",
}


def fail(rank: int, world: int, folder: Path) -> None:
    """Every fault, and work in between: what failed leaves nobody waiting for the wrong thing."""
    join(folder, rank, world)
    for fault in FAULTS:
        try:
            fault(rank)
        except Exception as error:
            (folder / f"{fault.__name__}-{rank}.txt").write_text(f"{error}")
        assert evaluate(rank).num_users == DATA.num_users
    with processes.alone():
        if rank == 0:
            fk.evaluate(member(1), DATA)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes said of every fault."""
    folder = tmp_path_factory.mktemp("failed")
    assert start(2, fail, folder) == [0, 0]
    return folder


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_differs_or_fails_ends_in_one_line_on_all(
    failed: Path, fault: Callable[[int], object]
) -> None:
    for rank in (0, 1):
        said = (failed / f"{fault.__name__}-{rank}.txt").read_text()
        assert FAULTS[fault] in said and "\n" not in said


def kill(call: int) -> None:
    if call == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def die(rank: int, world: int, folder: Path) -> None:
    join(folder, rank, world)
    fails = kill if rank == 1 else lambda call: None
    started = time.perf_counter()
    try:
        fk.evaluate(Broken(fails), DATA, batch_size=5)
    except fk.InputError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    assert time.perf_counter() - started < 60


def test_a_process_that_dies_ends_the_others_in_one_line(tmp_path: Path) -> None:
    assert start(3, die, tmp_path) == [0, -signal.SIGKILL, 0]
    for rank in (0, 2):
        assert "another process ended" in (tmp_path / f"{rank}.txt").read_text()


@pytest.fixture(params=[1, 2, 3, 5])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(processes, "world", lambda: request.param)
    return request.param


def test_every_batch_is_one_process_s(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the loads differ by the longest batch at most."""
    lengths = [7, 1, 9, 1, 1, 8, 8, 1, 5, 3, 3, 2]
    at_once, in_turn = [], []
    for rank in range(world):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        at_once.append(processes.own_numbers(lengths))
        dealer = processes.Dealer()
        in_turn.append([n for n, length in enumerate(lengths) if dealer.takes(length)])
    for own in (at_once, in_turn):
        assert sorted(number for part in own for number in part) == list(range(len(lengths)))
        loads = [sum(lengths[number] for number in part) for part in own]
        assert max(loads) - min(loads) <= 9


def test_shares_are_neighbours_and_of_alike_lengths(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = torch.tensor([1, 9, 1, 1, 1, 1, 5, 3])
    parts = []
    for rank in range(world):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(list(range(8))[processes.own_part(3, lengths)])
    assert sorted(index for part in parts for index in part) == list(range(8))
    assert max(int(lengths[part].sum()) for part in parts) <= 22 / world + 9


def test_every_sequence_is_one_process_s(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.tensor([1, 9, 1, 1, 1, 1, 5, 3])
    values = torch.arange(8.0, dtype=FP64)
    for own in (lengths, lengths[:1], lengths[:3]):
        seen, means = [], []
        for rank in range(world):
            monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
            part, weight = processes.own_share(own)
            means.append(weight * float(values[part].mean()))
            seen += list(range(len(own)))[part] if weight else []
        assert seen == list(range(len(own)))
        assert sum(means) / world == pytest.approx(float(values[: len(own)].mean()), rel=1e-12)
