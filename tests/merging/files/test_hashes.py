"""The hashes of what is merged are those of the files, which are read once for both."""

import hashlib
import random
from pathlib import Path

import pytest
import torch

import fisherkern as fk
from fisherkern.files import RunningHash
from fisherkern.merging.files import moved_rows, streaming, tensor_files

ITEMS = 20_000
IO = Path("/proc/self/io")


@pytest.mark.parametrize("most", [0, 3, 1 << 62])
def test_any_reads_give_the_hash_of_the_file(most):
    draw = random.Random(0)
    for size in (0, 1, 7, 100):
        content = draw.randbytes(size)

        def fill(view, start, content=content):
            view[:] = content[start : start + len(view)]

        for _ in range(20):
            running = RunningHash(fill, size, most)
            for _ in range(draw.randrange(8)):
                start, stop = sorted((draw.randint(0, size), draw.randint(0, size)))
                running.saw(memoryview(content[start:stop]), start)
            assert running.hexdigest() == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(("files", "world"), [(3, 1), (3, 2), (5, 4), (2, 7), (1, 3)])
def test_who_hashes_more_files_merges_fewer_rows(files, world, monkeypatch):
    for length in (0, 1, 999, 100_000):
        monkeypatch.setattr(tensor_files, "world", lambda: world)
        end, loads = 0, []
        for rank in range(world):
            monkeypatch.setattr(tensor_files, "rank", lambda rank=rank: rank)
            rows = tensor_files.own_rows(files, length, 10)
            assert rows.start == end and (end % 10 == 0 or end == length)
            end = rows.stop
            hashed = len(range(rank, files, world))
            share = (rows.stop - rows.start) / max(1, length)
            loads.append(files * share + tensor_files.HASHING * hashed)
        assert end == length
    if files > 2:
        assert max(loads) <= 1.001 * sum(loads) / world


def member(seed, order=False):
    torch.manual_seed(seed)
    model = fk.SASRec(ITEMS, max_len=4, dim=16, layers=1)
    if order:
        model.item_ids = [f"i{number}" for number in torch.randperm(ITEMS).tolist()]
    return model


def saved(folder, kind):
    """Members of a kind, and what `merge_files` is told besides."""
    paths, fishers = [], []
    for seed in range(2):
        model = member(seed, kind == "mixed")
        suffix = {"pth": ".pth", "dcp": ".dcp"}.get(kind, ".safetensors")
        paths.append(folder / f"m{seed}{suffix}")
        if kind == "pth":
            torch.save(model.state_dict(), paths[-1])
        else:
            fk.save_model(model, paths[-1])
        if kind == "fisher":
            values = {name: p.detach() ** 2 for name, p in model.named_parameters()}
            fishers.append(folder / f"f{seed}.safetensors")
            fk.DiagFisher(values, {}).save(fishers[-1])
    return paths, {"fishers": fishers or None}


# Bytes read by bytes of members: Fishers are read twice, mixed rows once more from their copy.
READ = {"alike": 1, "fisher": 3, "mixed": 2, "pth": 1, "dcp": 1}


@pytest.mark.skipif(not IO.exists(), reason="asks Linux what was read")
@pytest.mark.parametrize("kind", READ)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files_are_read_once_to_hash_and_to_merge(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "READ", 1 << 13)  # of which native files' first is read twice
    if kind == "mixed":
        monkeypatch.setattr(moved_rows, "_is_scattered", lambda *given: True)
    paths, known = saved(tmp_path, kind)
    out = tmp_path / ("out.pth" if kind == "pth" else "out.safetensors")
    merge = lambda: fk.merge_files(paths, out, **known)  # noqa: E731
    merge()  # what is imported on the way is read too
    before = read()
    found = merge()
    size = sum(file.stat().st_size for path in paths for file in files(path))
    beside = sum(file.stat().st_size for file in tmp_path.glob("m*.json"))
    assert READ[kind] * size <= read() - before <= (READ[kind] + 0.2) * size + 3 * beside
    for path, own in zip(paths, found["members"], strict=True):
        assert own["sha256"] == digest(path)
    for path, own in zip(known["fishers"] or [], found["fishers"] or [], strict=True):
        assert own["sha256"] == digest(path)


def read():
    return int(next(line.split()[1] for line in IO.open() if line.startswith("rchar")))


def files(path):
    return sorted(path.iterdir()) if path.is_dir() else [path]


def digest(path):
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files(path)]
    if not path.is_dir():
        return hashes[0]
    names = zip(hashes, files(path), strict=True)
    lines = "".join(f"{own}  {file.name}\n" for own, file in names)
    return hashlib.sha256(lines.encode()).hexdigest()
