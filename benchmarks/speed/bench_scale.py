"""Item tables of tens of millions of rows on one machine: memory, bytes and time.

    python -m benchmarks.speed.bench_scale merge --items 8000000 --folder F
    python -m benchmarks.speed.bench_scale fisher --items 10000000 --dim 64 --samplers topk sketch
    python -m benchmarks.speed.bench_scale evaluate --items 10000000 --dim 64

`merge` writes members as `bench_merge_files` does, and measures `merge_files` in processes of its
own (`--processes`), beside a plain copy: every input read once and as many bytes as the result
written, 8 MB at a time. Both begin with none of the files in memory, and end when all is on the
disk. The files are removed. `fisher` and `evaluate` take one batch of a SASRec of one block in a
process of its own.

`anon_mb` is the most anonymous memory that a process held, asked every 10 ms, without pages of
files: in `merge` all of it, Python with PyTorch included, of the process that held most; in the
others what was held beyond the model (and the data), of which `result_mb` is the Fisher that is
given back. `read_gb` and `written_gb` are what the processes asked of the system, `disk_read_gb`
what came from the disk. Refuses to start unless small files give the bits of `merge`, and a small
model's Fisher is that of a loop over autograd's gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fisherkern as fk
from benchmarks.common import append, check_columns, child_environment
from benchmarks.speed import bench_merge_files
from fisherkern.data import SequenceDataset

COLUMNS = """task case members items dim dtype processes sequences input_gb output_gb read_gb
    disk_read_gb written_gb anon_mb result_mb seconds cpu_seconds copy_seconds""".split()
PIECE = 1 << 23


def anonymous() -> float:
    """MB of anonymous memory that this process holds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 2**10
    raise SystemExit("bench_scale: needs Linux, which tells anonymous memory apart")


def transferred() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds, processor seconds, bytes and the most memory of the block."""
    found: dict[str, float] = {"anon_mb": anonymous()}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            found["anon_mb"] = max(found["anon_mb"], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    before, wall, cpu = transferred(), time.perf_counter(), time.process_time()
    watcher.start()
    yield found
    done.set()
    watcher.join()
    after = transferred()
    found["seconds"] = time.perf_counter() - wall
    found["cpu_seconds"] = time.process_time() - cpu
    for column, name in (("read_gb", "rchar"), ("disk_read_gb", "read_bytes")):
        found[column] = (after[name] - before[name]) / 1e9
    found["written_gb"] = (after["wchar"] - before["wchar"]) / 1e9


def dropped(paths: list[Path]) -> None:
    """Write the files out and let go of their pages."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def copied(paths: list[Path], size: int, target: Path) -> float:
    """Seconds to read every file and to write `size` bytes."""
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.read(PIECE):
                pass
    piece = bytes(PIECE)
    with target.open("wb", buffering=0) as stream:
        for begin in range(0, size, PIECE):
            stream.write(piece[: size - begin])
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def merge_child(members: list[str], fishers: list[str], out: str) -> dict[str, float]:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")
    with watched() as found:
        fk.merge_files(members, out, fishers=fishers or None)
    return found


def measure_merge(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        members, fishers = bench_merge_files.make(Path(place), options, options.items)
        beside = [path.with_suffix(".json") for path in members]
        inputs, out = [*members, *fishers, *beside], Path(place) / "merged.safetensors"
        given = json.dumps([*map(lambda own: list(map(str, own)), (members, fishers)), str(out)])
        dropped(inputs)
        rows = children(["merge", "--child", given], options.processes)
        results = [out, out.with_suffix(".json")]
        size = sum(path.stat().st_size for path in results)
        out.unlink()
        dropped(inputs)
        total = {name: sum(row[name] for row in rows) for name in rows[0]}
        return {
            **total,
            "case": f"{options.method}, {options.catalogue}",
            "members": options.members,
            "dtype": options.dtype,
            "input_gb": sum(path.stat().st_size for path in inputs) / 1e9,
            "output_gb": size / 1e9,
            "anon_mb": max(row["anon_mb"] for row in rows),
            "seconds": max(row["seconds"] for row in rows),
            "copy_seconds": copied(inputs, size, Path(place) / "copy"),
        }


def children(arguments: list[str], processes: int = 1) -> list[dict[str, float]]:
    """What each of the processes prints, all at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        group = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        environment = {**child_environment(), "MASTER_ADDR": "127.0.0.1"}
        environment |= {name: str(value) for name, value in group.items()}
        command = [sys.executable, "-m", "benchmarks.speed.bench_scale", *arguments]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    printed = [own.communicate()[0] for own in started]
    if any(own.returncode for own in started):
        raise SystemExit("bench_scale: a process failed; see what it said")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def encoder(items: int, dim: int) -> fk.SASRec:
    """Of one seed; the table in place of the usual slow draw, as its values do not matter."""
    with torch.device("meta"):
        model = fk.SASRec(items, max_len=50, dim=dim, heads=1, layers=1)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1, generator=generator)
    return model.eval()


def histories(items: int, sequences: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, items + 1, (sequences, 50), generator=generator)


def model_child(options: argparse.Namespace) -> dict[str, float]:
    model = encoder(options.items, options.dim)
    ids = histories(options.items, options.sequences)
    run: Callable[[], Any]
    if options.task == "fisher":
        settings = {} if options.child == "default" else {"sampler": options.child}
        run = lambda: fk.diag_fisher(model, [ids], progress=False, **settings)  # noqa: E731
    else:
        names = [f"item {v}" for v in range(options.items)]
        users = [str(user) for user in range(len(ids))]
        ends = np.arange(len(ids) + 1) * 50
        data = SequenceDataset("drawn", ids.flatten().numpy(), ends, names, users)
        model.item_ids = names
        run = lambda: fk.evaluate(model, data)  # noqa: E731
    held = anonymous()
    with watched() as found:
        result = run()
    tensors = result.values() if options.task == "fisher" else []
    found["result_mb"] = sum(own.numel() * own.element_size() for own in tensors) / 2**20
    return {**found, "anon_mb": found["anon_mb"] - held}


def check_fisher() -> None:
    """Raise SystemExit unless the sum over items is that of a loop over autograd's gradients."""
    model, ids = encoder(23, 4).double(), histories(23, 3)
    expected = {name: torch.zeros_like(own) for name, own in model.named_parameters()}
    for row in ids:
        log_p = model(row[None]).log_softmax(1)[0]
        for v in range(len(log_p)):
            gradients = torch.autograd.grad(
                log_p[v], list(model.parameters()), retain_graph=True, allow_unused=True
            )
            for name, own in zip(expected, gradients, strict=True):
                if own is not None:
                    expected[name] += log_p[v].exp().detach() * own.square() / len(ids)
    found = fk.diag_fisher(model, [ids], sampler="exact", progress=False)
    for name, own in expected.items():
        if not torch.allclose(found[name], own, rtol=1e-6, atol=1e-12):
            raise SystemExit(f"bench_scale: the Fisher of {name} differs from the loop's")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["merge", "fisher", "evaluate"])
    parser.add_argument("--folder", type=Path, help="for the files (default: the system's)")
    parser.add_argument("--method", choices=["uniform", "fisher"], default="uniform")
    parser.add_argument("--catalogue", choices=bench_merge_files.CATALOGUES, default="same")
    parser.add_argument("--samplers", nargs="+", default=["default", "topk", "sketch"])
    parser.add_argument("--items", type=int, default=8_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--dtype", choices=["F32", "F16", "BF16", "F64"], default="F32")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    if options.child:
        own = merge_child(*json.loads(options.child)) if options.task == "merge" else None
        print(json.dumps(own or model_child(options)))
        return
    try:
        check_columns("scale", COLUMNS)
    except fk.InputError as error:
        raise SystemExit(f"bench_scale: {error}") from None
    if options.task == "merge":
        bench_merge_files.check(options)
        found = [measure_merge(options)]
    else:
        check_fisher()
        sizes = ["--items", "--dim", "--sequences"]
        given = [text for name in sizes for text in (name, str(getattr(options, name[2:])))]
        cases = options.samplers if options.task == "fisher" else ["full ranking"]
        found = [
            {**children([options.task, "--child", case, *given])[0], "case": case, "dtype": "F32"}
            for case in cases
        ]
    known = vars(options) | {"sequences": "" if options.task == "merge" else options.sequences}
    for row in found:
        full = {name: row.get(name, known.get(name, "")) for name in COLUMNS}
        if options.task != "merge":
            full["members"] = ""
        append("scale", [full])
        print(", ".join(f"{name} {value}" for name, value in full.items()), flush=True)


if __name__ == "__main__":
    main()
