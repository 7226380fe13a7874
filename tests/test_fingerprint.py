import copy
import hashlib
import json

import pytest
import torch
from helpers.merging import Open
from torch import nn

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
