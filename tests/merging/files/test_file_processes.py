"""Two gloo processes merge files: the bytes of one process, and one line for what fails."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.merging_files import saved, saved_fisher

from fisherkern.errors import InputError
from fisherkern.merging import blocks
from fisherkern.merging.files import model_writing, moved_rows, streaming
from fisherkern.merging.files.streaming import merge_files
from fisherkern.training import save_model

resource = pytest.importorskip("resource")

IDS = ("abcdefghijk", "kxacbfyed", "zyjihgfedcbaw")
ALIKE, MIXED = ("m0", "m1", "m2"), ("x0", "x1", "x2")
CASES = {
    "uniform": (ALIKE, {}),
    "fisher": (ALIKE, {"fishers": True}),
    "ties": (ALIKE, {"method": "ties", "base": True}),
    "united": (MIXED, {}),
    "united-fisher": (MIXED, {"fishers": True}),
}
FAULTS = {
    "nan": "n1.safetensors: tensor 'output_bias' holds a NaN",
    "full": "out.safetensors: could not be written: File too large",
    "cut": "c1.safetensors: became shorter while it was read",
    "killed": "another process ended",
}


def small_blocks():
    blocks.BLOCK, streaming.READ = 13, 29
    moved_rows._is_scattered = lambda *arguments: True
    moved_rows.DEALT, moved_rows.GATHERED = 70, 300


def given(folder, case):
    names, known = CASES[case]
    known = dict(known)
    if known.pop("fishers", None):
        known["fishers"] = [folder / f"{name}.fisher.safetensors" for name in names]
    if known.pop("base", None):
        known["base"] = folder / "base.safetensors"
    return [folder / f"{name}.safetensors" for name in names], known


def fail(fault, folder):
    """Break this process, or a file that both read."""
    if fault == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    elif fault == "killed":
        model_writing._write_rows = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "cut":
        real = model_writing._write_rows

        def cut(path, merge):
            model_writing._write_rows = real
            with (folder / "c1.safetensors").open("r+b") as stream:
                stream.truncate(5000)
            real(path, merge)

        model_writing._write_rows = cut


def process(rank, folder, work):
    torch.set_num_threads(1)
    small_blocks()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for case in CASES if work == "merge" else ():
        paths, known = given(folder, case)
        found = merge_files(paths, folder / "two" / f"{case}.safetensors", **known)
        (folder / f"{case}-{rank}.txt").write_text(repr(found))
    for fault in FAULTS:
        if (fault == "killed") != (work == "killed"):
            continue
        paths, _ = given(folder, "uniform")
        if fault in ("nan", "cut"):
            paths[1] = folder / f"{fault[0]}1.safetensors"
        if rank == 1:
            fail(fault, folder)
        try:
            merge_files(paths, folder / "bad" / "out.safetensors")
        except InputError as error:
            (folder / f"{fault}-{rank}.txt").write_text(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        dist.barrier() if fault != "killed" else os._exit(0)


def run(folder, work):
    context = mp.get_context("spawn")
    started = [context.Process(target=process, args=(rank, folder, work)) for rank in (0, 1)]
    for own in started:
        own.start()
    for own in started:
        own.join(100)
        assert own.exitcode is not None
    return folder


def made(folder):
    """Members of one catalogue and of several, their Fishers, and one that holds a NaN."""
    for names, lists in ((ALIKE, ["abcdefghijk"] * 3), (MIXED, IDS)):
        for number, (name, ids) in enumerate(zip(names, lists, strict=True)):
            own = folder / f"from-{name}"
            own.mkdir()
            path, model = saved(own, number, ids=ids)
            for suffix in (".safetensors", ".json"):
                path.with_suffix(suffix).rename(folder / f"{name}{suffix}")
            fisher = saved_fisher(own, number, model)[0]
            fisher.rename(folder / f"{name}.fisher.safetensors")
            own.rmdir()
    for name in ("base", "n1", "c1"):
        path, model = saved(folder, 7, ids="abcdefghijk")
        if name == "n1":
            with torch.no_grad():
                model.output_bias[-1] = torch.nan
            save_model(model, path)
        for suffix in (".safetensors", ".json"):
            path.with_suffix(suffix).rename(folder / f"{name}{suffix}")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run(made(tmp_path_factory.mktemp("merged")), "merge")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_write_the_bytes_of_one(case, folder, monkeypatch):
    for module, names in (
        (blocks, ["BLOCK"]),
        (streaming, ["READ"]),
        (moved_rows, ["_is_scattered", "DEALT", "GATHERED"]),
    ):
        for name in names:  # so that they are put back
            monkeypatch.setattr(module, name, getattr(module, name))
    small_blocks()
    paths, known = given(folder, case)
    one = folder / "one" / f"{case}.safetensors"
    found = merge_files(paths, one, **known)
    for suffix in (".safetensors", ".json", ".md"):
        two = folder / "two" / f"{case}{suffix}"
        assert one.with_suffix(suffix).read_bytes() == two.read_bytes()
    for rank in (0, 1):
        assert (folder / f"{case}-{rank}.txt").read_text() == repr(found)
    assert len(list((folder / "two").iterdir())) == 3 * len(CASES)


@pytest.mark.parametrize("fault", ["nan", "full", "cut"])
def test_a_fault_in_one_ends_both_in_one_line_and_leaves_nothing(fault, folder):
    for rank in (0, 1):
        text = (folder / f"{fault}-{rank}.txt").read_text()
        assert FAULTS[fault] in text and "\n" not in text
    assert not os.listdir(folder / "bad")


def test_a_process_that_is_killed_ends_the_other_in_one_line(tmp_path):
    run(made(tmp_path), "killed")
    assert (tmp_path / "killed-0.txt").read_text() == (
        "another process ended before its time; see what it said"
    )
    assert not os.listdir(tmp_path / "bad")
