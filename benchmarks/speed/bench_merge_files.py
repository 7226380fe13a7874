"""Merging item tables too large to hold: python -m benchmarks.speed.bench_merge_files --folder F

Writes member files (SASRec, tied, one block) into a folder, merges them with `merge_files` in a
process of its own and appends what that took: time, and the most memory it ever held. The
members list the same items ("same"), or each nine tenths of another's and some of its own, in
order ("runs") or in an order of its own ("shuffled"). The files are removed. Refuses to start
unless small files of every kind give the bits of `merge` in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import append, check_columns, child_environment
from fisherkern import DiagFisher, InputError, SASRec, load_model, merge, merge_files
from fisherkern.merging.files.tensor_files import TYPES, raw, rows_per_block, spans, write_header

COLUMNS = """method catalogue members items dim dtype merged_items files_gb out_gb seconds
    cpu_seconds peak_mb""".split()
BLOCK = 1 << 22
CATALOGUES = ("same", "runs", "shuffled")


def numbers(catalogue: str, member: int, items: int) -> Tensor:
    """Which items of the world a member has, in its order."""
    first = 0 if catalogue == "same" else member * items // 10
    found = torch.arange(first, first + items)
    if catalogue != "shuffled":
        return found
    return found[torch.randperm(items, generator=torch.Generator().manual_seed(member))]


def write_json(path: Path, about: dict[str, Any], owned: Tensor) -> str:
    """The JSON beside a model, a piece at a time; the hash of its item ids."""
    digest = hashlib.sha256(b"[")
    with path.open("w") as stream:
        stream.write(json.dumps(about)[:-1] + ', "item_ids": [')
        for start in range(0, len(owned), 100_000):
            ids = [f"item {v}" for v in owned[start : start + 100_000].tolist()]
            text = (", " if start else "") + json.dumps(ids)[1:-1]
            stream.write(text)
            digest.update(text.encode())
        stream.write("]}\n")
    digest.update(b"]")
    return digest.hexdigest()


def values(shape: tuple[int, ...], seed: int, kind: str) -> Iterator[Tensor]:
    """Blocks of numbers: one random block whose entries are moved along from block to block."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(BLOCK, generator=generator)
    for start, stop in spans(shape, rows_per_block(shape, BLOCK)):
        count = (stop - start) * torch.Size(shape[1:]).numel()
        block = noise.roll(start % 997)[:count].to(TYPES[kind])
        yield block.reshape(stop - start, *shape[1:])


def write_tensors(path: Path, layout: dict[str, Any], header: dict[str, Any], seed: int) -> None:
    with path.open("wb") as stream:
        for name in write_header(stream, layout, {"fisherkern": json.dumps(header)}):
            for block in values(layout[name][1], seed, layout[name][0]):
                stream.write(raw(block))


def make(folder: Path, options: argparse.Namespace, items: int) -> tuple[list[Path], list[Path]]:
    """Members' files and, for Fisher merges, their Fishers'."""
    config = {"num_items": items, "dim": options.dim, "max_len": 50, "layers": 1}
    with torch.device("meta"):
        model = SASRec(**config)
    layout = {name: (options.dtype, tuple(p.shape)) for name, p in model.named_parameters()}
    members, fishers = [], []
    for member in range(options.members):
        path = folder / f"member{member}.safetensors"
        about = {"class": "SASRec", "config": model.config, "metrics": {}}
        owned = numbers(options.catalogue, member, items)
        digest = write_json(path.with_suffix(".json"), about, owned)
        header = {"kind": "model", "class": "SASRec", "config": model.config}
        write_tensors(path, layout, {**header, "item_ids_sha256": digest}, member)
        members.append(path)
        if options.method == "fisher":
            fishers.append(folder / f"member{member}.fisher.safetensors")
            write_tensors(fishers[-1], layout, {"kind": "diag_fisher", "meta": {}}, 100 + member)
    return members, fishers


def check(options: argparse.Namespace) -> None:
    """Raise SystemExit unless small files give the bits of the merge in memory."""
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        members, fishers = make(Path(place), options, 5000)
        out = Path(place) / "merged.safetensors"
        merge_files(members, out, fishers=fishers or None)
        held = [DiagFisher.load(path) for path in fishers] or None
        expected = merge([load_model(path) for path in members], fishers=held)
        found = load_model(out)
        for name, value in expected.state_dict().items():
            if not torch.equal(found.state_dict()[name], value):
                raise SystemExit(f"bench_merge_files: {name} differs from the merge in memory")
        if found.item_ids != expected.item_ids:
            raise SystemExit("bench_merge_files: the catalogue differs from that in memory")


def child(members: list[str], fishers: list[str], out: str) -> None:
    """What the measured process does: the merge, then its time and memory on stdout."""
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    provenance = merge_files(members, out, fishers=fishers or None)
    found = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "merged_items": provenance["catalogue"]["items"],
    }
    print(json.dumps(found))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        members, fishers = make(Path(place), options, options.items)
        out = Path(place) / "merged.safetensors"
        arguments = json.dumps([*map(lambda p: list(map(str, p)), (members, fishers)), str(out)])
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.speed.bench_merge_files", "--child", arguments],
            env=child_environment(),
            stdout=subprocess.PIPE,
            check=True,
        )
        return {
            "method": options.method,
            "catalogue": options.catalogue,
            "members": options.members,
            "items": options.items,
            "dim": options.dim,
            "dtype": options.dtype,
            "files_gb": sum(path.stat().st_size for path in (*members, *fishers)) / 1e9,
            "out_gb": out.stat().st_size / 1e9,
            **json.loads(done.stdout),
        }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="for the files (default: the system's)")
    parser.add_argument("--method", choices=["uniform", "fisher"], default="uniform")
    parser.add_argument("--catalogue", choices=CATALOGUES, default="same")
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--dtype", choices=["F32", "F16", "BF16", "F64"], default="F32")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(*json.loads(options.child))
        return
    torch.set_num_threads(1)
    try:
        check_columns("merge_files", COLUMNS)
    except InputError as error:
        raise SystemExit(f"bench_merge_files: {error}") from None
    check(options)
    found = measure(options)
    append("merge_files", [{name: found[name] for name in COLUMNS}])
    print(", ".join(f"{name} {found[name]}" for name in COLUMNS), flush=True)


if __name__ == "__main__":
    main()
