"""Fishers whose large matrices are kept as row and column sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fisherkern as fk
from fisherkern.errors import InputError
from fisherkern.files import save_tensors


def members(count: int = 2) -> list[fk.SASRec]:
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(fk.SASRec(50, max_len=6, dim=8, layers=1).eval())
        found[-1].item_ids = [f"i{v}" for v in range(50)]
    return found


def fisher(model: fk.SASRec) -> fk.DiagFisher:
    items = torch.randint(1, 51, (20, 6), generator=torch.Generator().manual_seed(0))
    return fk.diag_fisher(model, [{"history": items}], sampler="exact", progress=False)


def test_a_matrix_has_the_sums_of_its_rows_and_columns(tmp_path: Path) -> None:
    """Against loops; other tensors stay as they are, bit for bit."""
    whole = fisher(members()[0])
    whole.save(tmp_path / "f.safetensors", factored=400)
    found = fk.DiagFisher.load(tmp_path / "f.safetensors")
    assert sorted(found) == sorted(whole) and found.meta == whole.meta
    for name, value in whole.items():
        if value.dim() != 2 or value.numel() < 400:
            assert torch.equal(found[name], value)
            continue
        rows = [sum(float(x) for x in row) for row in value]
        columns = [sum(float(x) for x in column) for column in value.t()]
        expected = [[r * c / sum(rows) for c in columns] for r in rows]
        torch.testing.assert_close(found[name], torch.tensor(expected), rtol=1e-5, atol=0)
    whole.save(tmp_path / "whole.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("f", "whole")]
    assert sizes[0] < sizes[1] - 4 * 50 * 8 / 2


def test_a_matrix_of_zeros_stays_one(tmp_path: Path) -> None:
    zeros = fk.DiagFisher({"a": torch.zeros(3, 4), "b": torch.ones(())}, {})
    zeros.save(tmp_path / "f.safetensors", factored=1)
    assert torch.equal(fk.DiagFisher.load(tmp_path / "f.safetensors")["a"], torch.zeros(3, 4))


@pytest.mark.parametrize("other_order", [False, True])
def test_files_are_merged_as_in_memory(tmp_path: Path, other_order: bool) -> None:
    networks = members()
    if other_order:
        networks[1].item_ids = networks[1].item_ids[::-1]
    fishers, paths = [], []
    for number, network in enumerate(networks):
        fk.save_model(network, tmp_path / f"m{number}.safetensors")
        paths.append(tmp_path / f"m{number}.fisher.safetensors")
        fisher(network).save(paths[-1], factored=100)
        fishers.append(fk.DiagFisher.load(paths[-1]))
    files = [tmp_path / f"m{number}.safetensors" for number in range(2)]
    fk.merge_files(files, tmp_path / "out.safetensors", method="fisher", fishers=paths)
    found = fk.load_model(tmp_path / "out.safetensors").state_dict()
    for name, value in fk.merge(networks, fishers=fishers).state_dict().items():
        assert torch.equal(found[name], value)


def test_refusals(tmp_path: Path) -> None:
    """A sentence that names the file or the argument."""
    whole = fk.DiagFisher({"a": torch.ones(3, 4), "a.row_sums": torch.ones(3)}, {})
    with pytest.raises(InputError, match="factored: a parameter is named like the factors"):
        whole.save(tmp_path / "f.safetensors", factored=1)
    with pytest.raises(InputError, match="factored must be at least 1, got 0"):
        fisher(members()[0]).save(tmp_path / "f.safetensors", factored=0)
    with pytest.raises(InputError, match="is a folder"):
        fisher(members()[0]).save(tmp_path / "f.dcp", factored=1)
    assert not list(tmp_path.iterdir())
    part = torch.ones(3)
    for tensors, names, reason in (
        ({"a.row_sums": part}, ["a"], "tensor 'a.column_shares' is missing"),
        ({"a.row_sums": part, "a.column_shares": part, "a": part}, ["a"], "stands there twice"),
        ({"a.row_sums": part, "a.column_shares": part}, ["a", "a"], "stands there twice"),
        ({"a.row_sums": part, "a.column_shares": part[None]}, ["a"], "no vectors of one type"),
        ({"a.row_sums": part, "a.column_shares": part.double()}, ["a"], "no vectors of one type"),
        ({"a": part}, "a", "its list of factored matrices is 'a'"),
    ):
        path = tmp_path / "bad.fisher.safetensors"
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        save_tensors(path, own, {"kind": "diag_fisher", "meta": {}, "factored": names})
        with pytest.raises(InputError, match=reason):
            fk.DiagFisher.load(path)
        fk.save_model(members()[0], tmp_path / "m.safetensors")
        with pytest.raises(InputError, match=reason):
            fk.merge_files(
                [tmp_path / "m.safetensors"] * 2, tmp_path / "out.safetensors", fishers=[path] * 2
            )
        assert not (tmp_path / "out.safetensors").exists()
