"""The package's readers: the files that each is given, whole, and how it is called."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "adapters")]

import native_checkpoints as native  # noqa: E402

import fisherkern as fk  # noqa: E402
from fisherkern.cli import COMMANDS  # noqa: E402
from fisherkern.cli.claims import FolderClaim  # noqa: E402
from fisherkern.cli.parsing import make_app, parse  # noqa: E402
from fisherkern.cli.recipe import from_file  # noqa: E402
from fisherkern.errors import InputError  # noqa: E402
from fisherkern.files import write_json  # noqa: E402


@dataclass(frozen=True)
class Reader:
    """make(folder): write whole files, and name those to change. read(folder): call the reader."""

    make: Callable[[Path], list[str]]
    read: Callable[[Path], object]


DATA = fk.synthetic(12, 10, clusters=3, tastes=2, min_length=4, max_length=6)


def _model(seed: int = 0, kind: str = "SASRec") -> fk.SASRec:
    torch.manual_seed(seed)
    sizes = {} if kind == "Caser" else {"layers": 1}
    model = getattr(fk, kind)(DATA.num_items, max_len=4, dim=4, **sizes)
    model.item_ids = list(DATA.item_ids)
    return model.eval()


def _models(kind: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        fk.save_model(_model(0, kind), folder / "a.safetensors", metrics={"ndcg@10": 0.5})
        fk.save_model(_model(1, kind), folder / "b.safetensors")
        return ["a.safetensors", "a.safetensors", "a.json"]

    return make


def _parallel(folder: Path) -> list[str]:
    fk.save_model(fk.ParallelEncoders([_model(0), _model(1)]), folder / "a.safetensors")
    return ["a.safetensors"]


def _surgery(folder: Path) -> list[str]:
    model = fk.SurgeryEncoder(_model(), 1, 2, torch.Generator().manual_seed(0))
    fk.save_model(model, folder / "a.safetensors")
    return ["a.safetensors"]


def _used(folder: Path) -> None:
    """Load a model and use it, as what is loaded must also run."""
    model = fk.load_model(folder / "a.safetensors")
    with torch.no_grad():
        model(torch.ones(1, 2, dtype=torch.int64))


def _fishers(folder: Path) -> list[str]:
    _models("SASRec")(folder)
    for seed, name in enumerate("ab"):
        batches = DATA.loader(max_len=4)
        found = fk.diag_fisher(_model(seed), batches, sampler="topk", k=3, progress=False)
        found.save(folder / f"{name}.fisher.safetensors")
    return ["a.fisher.safetensors"]


def _streamed(folder: Path, **more: object) -> None:
    members = [folder / f"{name}.safetensors" for name in "ab"]
    fk.merge_files(members, folder / "out.safetensors", **more)  # type: ignore[arg-type]
    for made in folder.glob("out.*"):
        made.unlink()


def _streamed_fishers(folder: Path) -> None:
    _streamed(folder, fishers=[folder / f"{name}.fisher.safetensors" for name in "ab"])


def _merged_by_fishers(folder: Path) -> None:
    fishers = [fk.DiagFisher.load(folder / f"{name}.fisher.safetensors") for name in "ab"]
    fk.merge([_model(0), _model(1)], fishers=fishers)


SETTINGS = {"epochs": 1, "batch_size": 8, "progress": False}


def _train(folder: Path) -> None:
    objective = fk.NextItem()
    fk.train(_model(), DATA, objective=objective, state=folder / "state", **SETTINGS)


def _state(folder: Path) -> list[str]:
    _train(folder)
    return ["state"]


def _train_peers(folder: Path) -> None:
    models, objective = (_model(0), _model(1)), fk.NextItem()
    fk.train_peers(*models, DATA, objective=objective, state=folder / "state", **SETTINGS)


def _peers(folder: Path) -> list[str]:
    _train_peers(folder)
    return ["state"]


def _native(write: Callable[[Path], object], name: str, *parts: str) -> Reader:
    def make(folder: Path) -> list[str]:
        path = folder / name
        write(path)
        if not path.is_dir():
            return [name]
        return [f"{name}/{own.name}" for own in sorted(path.iterdir())]

    def read(folder: Path) -> None:
        found = fk.load_tensors(folder / name)
        for tensor in found.values():
            if tensor.numel() < 1 << 20:
                tensor.double().sum() if not tensor.is_complex() else None

    return Reader(make, read)


RECIPE = """
members:
  - {model: a.safetensors, fisher: a.fisher.safetensors, weight: 0.5}
  - {model: b.safetensors, fisher: b.fisher.safetensors, weight: &w 1e-1}
method: fisher
options: {group: row}
floor: 0.1
normalize: mean
check_fingerprint: true
seed: 3
data: data.txt
batch_size: 64
out: merged
"""


def _text(name: str, text: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        content = text.encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return [name]

    return make


def _config(folder: Path) -> None:
    parse(make_app(COMMANDS), ["train", "--config", str(folder / "config.json")])


def _claimed(folder: Path) -> None:
    with FolderClaim(folder, "merge", {"seed": 0}, ["merged.safetensors"], [], same_arguments=True):
        pass


def _results(folder: Path) -> list[str]:
    told = {"arguments": {"command": "merge", "seed": 0, "out": None}, "report": {"weights": [1]}}
    write_json(folder / "result.json", told)
    (folder / "merged.safetensors").write_bytes(b"x")
    return ["result.json"]


ROWS = [(u, i, 10 * u + i) for u in range(1, 5) for i in range(1, 6)]
ARGUMENTS = {"command": "train", "data": "ml-1m", "epochs": 3, "lr": 1e-3, "betas": [0.9, 0.98],
             "tied": None, "compile": False, "out": "runs/a", "seed": 0}  # fmt: skip


def _table(name: str, form: str, header: str = "", **columns: object) -> Reader:
    text = header + "".join(form.format(u=u, i=i, t=t) for u, i, t in ROWS)
    return Reader(_text(name, text), lambda folder: fk.load(folder / name, **columns))  # type: ignore[arg-type]


def _parquet(folder: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    users, items, times = zip(*ROWS, strict=True)
    table = pyarrow.table({"user_id": users, "item_id": items, "timestamp": times})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return ["a.parquet"]


def _attributes(folder: Path) -> list[str]:
    _text("a.txt", "".join(f"{u} {i}\n" for u, i, _ in ROWS))(folder)
    (folder / "a.attributes.json").write_text(json.dumps({str(i): [i, 3] for i in range(1, 6)}))
    return ["a.attributes.json"]


NAMES = "user_id,item_id,timestamp\n"
READERS: dict[str, Reader] = {
    "recipe": Reader(_text("r.yaml", RECIPE), lambda folder: from_file(folder / "r.yaml")),
    "config": Reader(_text("config.json", json.dumps({"arguments": ARGUMENTS})), _config),
    "result": Reader(_results, _claimed),
    **{f"model {kind}": Reader(_models(kind), _used) for kind in ("SASRec", "GRU4Rec", "Caser")},
    "model parallel": Reader(_parallel, _used),
    "model surgery": Reader(_surgery, _used),
    "merge from disk": Reader(_models("BERT4Rec"), _streamed),
    "merge Fishers from disk": Reader(_fishers, _streamed_fishers),
    "Fisher": Reader(_fishers, _merged_by_fishers),
    "state": Reader(_state, _train),
    "state of peers": Reader(_peers, _train_peers),
    "RecBole": _native(native.recbole, "a.pth"),
    "Lightning": _native(native.lightning, "a.ckpt"),
    "RecTools": _native(native.rectools, "a.ckpt"),
    "state dict": _native(native.raw, "a.pt"),
    "old container": _native(native.legacy, "a.pt"),
    "module": _native(native.module, "a.pt"),
    "foreign safetensors": _native(native.foreign, "a.safetensors"),
    "Hugging Face shards": _native(native.shards("safetensors"), "model"),
    "user item lines": _table("a.txt", "{u} {i}\n"),
    "ratings.dat": _table("a.dat", "{u}::{i}::5::{t}\n"),
    "CSV": _table("a.csv", "{u},{i},{t}\n", NAMES),
    "CSV with quotes": _table("a.csv", '{u},"{i}, x",2024-05-{i:02d}\n', NAMES),
    "CSV in gzip": _table("a.csv.gz", "{u},{i},{t}\n", NAMES),
    "TSV without header": _table("a.tsv", "{u}\t{i}\t{t}\n", user=0, item=1, time=2),
    "RecBole .inter": _table(
        "a.inter", "{u}\t{i}\t{t}\n", "user_id:token\titem_id:token\ttimestamp:float\n"
    ),
    "records": _table("a.jsonl", '{{"user_id": {u}, "item_id": "{i}", "timestamp": {t}}}\n'),
    "Parquet": Reader(_parquet, lambda folder: fk.load(folder / "a.parquet")),
    "attributes": Reader(_attributes, lambda folder: fk.load(folder / "a.txt")),
}


def outcome(reader: Reader, folder: Path) -> str:
    """Return "read" or "refused"; anything else that is raised goes on."""
    try:
        reader.read(folder)
    except InputError as error:
        text = str(error)
        if not text.isprintable() or len(text) > 1100:
            raise AssertionError(f"a message of {len(text)} characters: {text!r}") from error
        return "refused"
    return "read"


def copied(source: Path, target: Path) -> None:
    """Make `target` a copy of the folder, whatever was in it."""
    for entry in target.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for entry in source.iterdir():
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name)
        else:
            shutil.copy(entry, target / entry.name)


def listing(folder: Path) -> list[str]:
    """Return all files below the folder."""
    return sorted(os.path.relpath(path, folder) for path in folder.rglob("*"))
