"""Folders of `torch.distributed.checkpoint`: as torch reads them, and nothing of them runs."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpointing
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

import fisherkern as fk
from fisherkern.adapters.files.dcp_files import DcpFolder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STATE: dict[str, Any] = {
    "table": torch.arange(21.0).view(7, 3),
    "half": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "number": torch.tensor(4),
    "flags": torch.tensor([True, False]),
    "none": torch.zeros(0, 3),
    "turned": torch.arange(6.0).view(2, 3).t(),
    "inner": {"bias": torch.ones(2, dtype=torch.float64), "note": "text"},
    "step": 3,
}


def written(path: Path, state: dict[str, Any] | None = None) -> Path:
    checkpointing.save(state or STATE, checkpoint_id=path, no_dist=True)
    return path


def pickled(value: Any) -> bytes:
    """The pickle in what torch.save writes."""
    stream = io.BytesIO()
    torch.save(value, stream)
    with zipfile.ZipFile(stream) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return archive.read(name)


def changed(path: Path, change: Callable[[Metadata], Any]) -> Path:
    """A folder with other metadata."""
    reader = checkpointing.FileSystemReader(written(path))
    metadata = reader.read_metadata()
    (path / ".metadata").write_bytes(pickled(change(metadata) or metadata))
    return path


def test_tensors_are_those_that_torch_reads(tmp_path: Path) -> None:
    found = DcpFolder(written(tmp_path / "x"))
    expected = {
        name: torch.full_like(value, 1)
        for name, value in {**STATE, "inner.bias": STATE["inner"]["bias"]}.items()
        if isinstance(value, torch.Tensor)
    }
    checkpointing.load(expected, checkpoint_id=tmp_path / "x", no_dist=True)
    assert set(found) == set(expected) and found.others == ["inner.note", "step"]
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    assert torch.equal(found.rows("table", 2, 5), expected["table"][2:5])
    assert found.rows("table", 3, 3).shape == (0, 3)
    with pytest.raises(fk.InputError, match="has no rows 2 to 8"):
        found.rows("table", 2, 8)


def test_parts_of_a_tensor_are_put_together(tmp_path: Path) -> None:
    """Of boxes that torch's own metadata describes: a table cut both ways."""
    table = STATE["table"]
    cuts = {(0, 0): (4, 2), (0, 2): (4, 1), (4, 0): (3, 3)}
    boxes = {
        f"box {o[0]} {o[1]}": table[o[0] : o[0] + n[0], o[1] : o[1] + n[1]].clone()
        for o, n in cuts.items()
    }

    def joined(metadata: Metadata) -> None:
        chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(n)) for o, n in cuts.items()]
        first = metadata.state_dict_metadata["box 0 0"]
        first.size, first.chunks = table.shape, chunks
        metadata.state_dict_metadata = {"table": first}
        places = {index.fqn: place for index, place in metadata.storage_data.items()}
        metadata.storage_data = {
            MetadataIndex("table", torch.Size(o), i): places[f"box {o[0]} {o[1]}"]
            for i, o in enumerate(cuts)
        }

    reader = checkpointing.FileSystemReader(written(tmp_path / "x", boxes))
    metadata = reader.read_metadata()
    joined(metadata)
    (tmp_path / "x" / ".metadata").write_bytes(pickled(metadata))
    found = DcpFolder(tmp_path / "x")
    assert torch.equal(found["table"], table)
    assert torch.equal(found.rows("table", 3, 6), table[3:6])


class Call:
    def __init__(self, function: Any, *args: Any) -> None:
        self.parts = function, args

    def __reduce__(self) -> Any:
        return self.parts


@pytest.mark.parametrize("place", ["alone", "beside", "size"])
def test_nothing_in_the_metadata_runs(place: str, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    attack: Any = Call(os.system, f"touch {flag}")

    def attacked(metadata: Metadata) -> Any:
        if place == "beside":
            metadata.planner_data = attack
        elif place == "size":
            metadata.state_dict_metadata["table"].size = attack
        return attack if place == "alone" else None

    path = changed(tmp_path / "x", attacked)
    if place == "beside":
        assert torch.equal(DcpFolder(path)["table"], STATE["table"])
    else:
        with pytest.raises(fk.InputError, match="describes no tensors"):
            DcpFolder(path)
    assert not flag.exists()


def _without_a_part(metadata: Metadata) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == "table")
    del metadata.storage_data[index]


def _with_a_gap(metadata: Metadata) -> None:
    metadata.state_dict_metadata["table"].size = torch.Size((8, 3))


def _elsewhere(metadata: Metadata) -> None:
    place = next(p for index, p in metadata.storage_data.items() if index.fqn == "table")
    place.relative_path = "../secret"


def _of_another(metadata: Metadata) -> None:
    places = {index.fqn: place for index, place in metadata.storage_data.items()}
    places["table"].offset = places["half"].offset
    places["table"].length = places["half"].length


DAMAGE: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "a part is missing": (_without_a_part, "the part at .* is missing"),
    "a gap": (_with_a_gap, "leave gaps, or overlap"),
    "another folder": (_elsewhere, "no file beside it"),
    "another tensor": (_of_another, "is no part of 'table'"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_metadata_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    change, sentence = DAMAGE[case]
    path = changed(tmp_path / "x", change)
    with pytest.raises(fk.InputError, match=sentence) as caught:
        DcpFolder(path)["table"]
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_files_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "x")
    shard, metadata = path / "__0_0.distcp", path / ".metadata"
    content = shard.read_bytes()
    shard.write_bytes(content[:-9])
    with pytest.raises(fk.InputError, match="__0_0.distcp: the shard is cut short"):
        DcpFolder(path)
    shard.unlink()
    with pytest.raises(fk.InputError, match="__0_0.distcp: the shard is missing"):
        DcpFolder(path)
    shard.write_bytes(content)
    whole = metadata.read_bytes()
    for size in range(0, len(whole), 37):
        metadata.write_bytes(whole[:size])
        with pytest.raises(fk.InputError, match="metadata"):
            DcpFolder(path)
    metadata.unlink()
    with pytest.raises(fk.InputError, match="no folder of torch"):
        DcpFolder(path)


def test_a_foreign_folder_is_loaded_into_a_model(tmp_path: Path) -> None:
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    written(tmp_path / "x", {"model": model.state_dict(), "optimizer": {"step": 1}})
    fk.load_dcp(other, tmp_path / "x")
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
    with pytest.raises(fk.InputError, match=r"'weight' has shape \(2, 3\), not \(2, 4\)"):
        fk.load_dcp(torch.nn.Linear(4, 2), tmp_path / "x")
    with pytest.raises(fk.InputError, match="tensor .* is missing"):
        fk.load_dcp(torch.nn.Sequential(other), tmp_path / "x")


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "x.dcp"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    fisher = fk.DiagFisher({"w": torch.ones(2)}, {})
    with pytest.raises(fk.InputError, match="is there, and no folder"):
        fisher.save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["x.dcp"]
    assert (target / "notes.txt").read_text() == "mine"
