import copy
import hashlib
import json
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from helpers.merging import Open
from torch import nn

import fisherkern as fk
from fisherkern.fingerprint import fingerprint, item_ids_sha256


def test_a_copy_has_the_same_fingerprint_and_one_changed_bit_another():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    assert fingerprint(twin) == fingerprint(model)
    assert len(fingerprint(model)) == 64
    twin.weight.data.view(torch.int32)[0, 0] ^= 1
    assert fingerprint(twin) != fingerprint(model)


def test_the_dtype_enters():
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    # Zeros of two 16-bit types are the same bytes.
    assert len({fingerprint(copy.deepcopy(model).to(dtype)) for dtype in dtypes}) == 4


def test_a_parameter_without_entries_has_one():
    model = nn.Linear(2, 3)
    # As NumPy's arrays without entries become tensors, with a stride that bytes cannot have.
    model.times = nn.Parameter(torch.zeros(0).as_strided((0,), (0,)))
    assert fingerprint(copy.deepcopy(model)) == fingerprint(model) != fingerprint(nn.Linear(2, 3))


def test_the_shape_and_the_names_enter():
    def of(**tensors):
        model = Open()
        for name, tensor in tensors.items():
            model.register_parameter(name, nn.Parameter(tensor))
        return fingerprint(model)

    zeros = torch.zeros
    prints = [of(a=zeros(6)), of(a=zeros(2, 3)), of(b=zeros(6)), of(a=zeros(3), b=zeros(3))]
    assert len(set(prints)) == 4
    assert of(a=zeros(1), b=zeros(2)) == of(b=zeros(2), a=zeros(1))


def test_memory_layout_does_not_enter_and_odd_shapes_work():
    rows, columns = Open(), Open()
    value = torch.arange(6.0).reshape(2, 3)
    rows.w = nn.Parameter(value.clone())
    columns.w = nn.Parameter(value.t().contiguous().t())
    assert fingerprint(rows) == fingerprint(columns)
    for module in (rows, columns):
        module.scalar = nn.Parameter(torch.tensor(2.0))
        module.empty = nn.Parameter(torch.zeros(0, 4))
    assert fingerprint(rows) == fingerprint(columns)
    columns.scalar.data.fill_(3.0)
    assert fingerprint(rows) != fingerprint(columns)


@pytest.mark.parametrize("count", [0, 1, 2, (1 << 16) - 1, 1 << 16, (1 << 16) + 1])
def test_item_ids_are_hashed_as_their_json(count):
    ids = [f"item {v} é" for v in range(count)]
    assert item_ids_sha256(ids) == hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def test_no_item_ids_have_no_hash():
    assert item_ids_sha256(None) is None
    assert item_ids_sha256("x") == hashlib.sha256(b'"x"').hexdigest()


class Scaled(nn.Module):
    """A head with running statistics, a frozen table and what is never saved."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.items = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 6)
        self.register_buffer("frozen", torch.randn(6, 4, generator=generator))
        self.register_buffer("cache", torch.randn(2, generator=generator), persistent=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, history):
        return self.out(self.norm((self.items(history) + self.frozen[history]).sum(1)))


def saved(model, path):
    safetensors.torch.save_file(model.state_dict(), path)
    return path


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("buffer", ["norm.running_mean", "frozen"])
def test_a_fisher_of_other_buffers_is_refused(tmp_path, buffer, wrapped):
    """In memory and from files; one that says nothing of buffers is taken, as old files are."""
    members, histories = [Scaled(0), Scaled(1)], torch.tensor([[1, 2], [3, 5]])
    fishers = [fk.diag_fisher(m, [histories], k=3, progress=False) for m in members]
    assert sorted(fishers[0].meta["buffers"]) == ["frozen", "norm.running_mean", "norm.running_var"]
    holder = (lambda model: nn.Sequential(OrderedDict(module=model))) if wrapped else lambda m: m
    paths = [saved(holder(m), tmp_path / f"{n}.safetensors") for n, m in enumerate(members)]
    stored = [tmp_path / f"f{n}.safetensors" for n in range(2)]
    for fisher, path in zip(fishers, stored, strict=True):
        fisher.save(path)
    fk.merge(members, fishers=fishers)
    fk.merge_files(paths, tmp_path / "out.safetensors", fishers=stored)
    members[1].cache += 1
    members[1].norm.num_batches_tracked += 1
    fk.merge([members[0], members[1]], fishers=fishers)
    members[1].norm.num_batches_tracked -= 1
    members[1].get_buffer(buffer).add_(1)
    saved(holder(members[1]), paths[1])
    told = f"computed on another model: buffer '{buffer}' has other values in "
    with pytest.raises(fk.InputError, match=f"^the Fisher of member 1 was {told}the member"):
        fk.merge(members, fishers=fishers)
    with pytest.raises(fk.InputError, match=f"f1.safetensors was {told}.*1.safetensors"):
        fk.merge_files(paths, tmp_path / "out.safetensors", fishers=stored)
    fk.merge(members, fishers=fishers, check_fingerprint=False)
    fk.merge_files(paths, tmp_path / "out.safetensors", fishers=stored, check_fingerprint=False)
    for fisher, path in zip(fishers, stored, strict=True):
        del fisher.meta["buffers"]
        fisher.save(path)
    fk.merge(members, fishers=fishers)
    fk.merge_files(paths, tmp_path / "out.safetensors", fishers=stored)
