"""Native checkpoints are read bit for bit, lazily, and nothing of them runs."""

from __future__ import annotations

import sys
from collections import OrderedDict

import native_checkpoints as native
import numpy as np
import pytest
import torch

import fisherkern as fk
from fisherkern.adapters import load_tensors
from fisherkern.adapters.files.mapped import MappedFile
from fisherkern.errors import InputError


@pytest.fixture(params=native.KINDS)
def made(request, tmp_path):
    """(path, kind, the values) of every kind of checkpoint."""
    kind, write = native.KINDS[request.param]
    path = tmp_path / request.param
    return path, kind, write(path)


def test_every_kind_is_read_bit_for_bit(made):
    path, kind, expected = made
    native.RAN.clear()
    checkpoint = load_tensors(path)
    assert checkpoint.kind == kind
    assert sorted(checkpoint) == sorted(expected)
    for name, value in expected.items():
        assert native.same(checkpoint[name], value), name
        assert checkpoint.shape(name) == value.shape
        assert checkpoint.dtype(name) == value.dtype
    assert native.RAN == []
    assert "vanished" not in sys.modules


def test_rows_are_the_tensor_s(made):
    path, _, expected = made
    checkpoint = load_tensors(path)
    for name, value in expected.items():
        rows = value if value.dim() else value[None]
        for start, stop in ((0, len(rows)), (1, len(rows)), (0, 0), (len(rows), len(rows))):
            if value.dim() or stop - start == 1:
                found = checkpoint.rows(name, start, stop)
                assert native.same(found.reshape(rows[start:stop].shape), rows[start:stop]), name
        with pytest.raises(InputError, match="has no rows"):
            checkpoint.rows(name, 0, len(rows) + 1)


def test_changing_a_tensor_never_changes_the_file(made):
    path, _, expected = made
    files = [path] if path.is_file() else sorted(path.iterdir())
    before = [file.read_bytes() for file in files]
    for tensor in load_tensors(path).values():
        if 0 not in tensor.stride():
            tensor.zero_()
    assert [file.read_bytes() for file in files] == before
    again = load_tensors(path)
    assert all(native.same(again[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", ["raw.pth", "legacy.pt", "foreign.safetensors"])
def test_another_file_under_the_same_name_changes_nothing(name, tmp_path):
    path = tmp_path / name
    expected = native.KINDS[name][1](path)
    checkpoint = load_tensors(path)
    native.KINDS[name][1](tmp_path / "other", seed=1)
    (tmp_path / "other").rename(path)
    for tensor_name, value in expected.items():
        assert native.same(checkpoint[tensor_name], value)
        length = len(value) if value.dim() else 1
        assert native.same(checkpoint.rows(tensor_name, 0, length), value)


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]


# torch itself does not read the newest types in the old container.
TYPED = [
    *((False, dtype) for dtype in DTYPES),
    *((True, dtype) for dtype in DTYPES if dtype not in torch.storage._new_dtypes()),
]


@pytest.mark.parametrize(("old", "dtype"), TYPED, ids=str)
def test_every_type_as_torch_reads_it(old, dtype, tmp_path):
    values = torch.randint(0, 2, (3, 5), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "a.pth"
    torch.save(
        {"a": values.to(torch.float32).to(dtype)}, path, _use_new_zipfile_serialization=not old
    )
    expected = torch.serialization.load(path, weights_only=True)["a"]
    assert native.same(load_tensors(path)["a"], expected)


VIEWS = {
    "transposed": lambda t: t.t(),
    "rows": lambda t: t[2:4],
    "column": lambda t: t[:, 1],
    "every other": lambda t: t[::2, 1::2],
    "expanded": lambda t: t[:1].expand(5, 4),
    "overlapping": lambda t: t.as_strided((3, 3), (1, 1), 2),
    "number": lambda t: t[3, 2],
    "empty": lambda t: t[3:3],
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_views_share_their_storage_again(old, tmp_path):
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    saved = {"base": base} | {name: view(base) for name, view in VIEWS.items()}
    path = tmp_path / "a.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=not old)
    checkpoint = load_tensors(path)
    start = checkpoint["base"].untyped_storage().data_ptr()
    for name, value in saved.items():
        found = checkpoint[name]
        assert native.same(found, value), name
        assert found.stride() == value.stride()
        assert found.storage_offset() == value.storage_offset()
        assert found.untyped_storage().data_ptr() == start
    checkpoint["base"].zero_()
    assert checkpoint["transposed"].abs().sum() == 0


def test_parameters_with_and_without_attributes(tmp_path):
    plain, marked = (torch.nn.Parameter(torch.randn(2, 2)) for _ in range(2))
    marked.axis = "rows"
    torch.save({"plain": plain, "marked": marked}, tmp_path / "a.pth")
    checkpoint = load_tensors(tmp_path / "a.pth")
    assert native.same(checkpoint["plain"], plain)
    assert native.same(checkpoint["marked"], marked)


PROTOCOLS = [*((False, protocol) for protocol in range(1, 6)), *((True, p) for p in range(2, 6))]


@pytest.mark.parametrize(("old", "protocol"), PROTOCOLS)
def test_every_pickle_protocol(old, protocol, tmp_path):
    ids = ["é", -(2**70), 2**31, -1.5, None, True]
    saved = {"state_dict": native.values(), "hyper_parameters": {"item_external_ids": ids}}
    path = tmp_path / "a.ckpt"
    torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not old)
    checkpoint = load_tensors(path)
    assert all(native.same(checkpoint[name], value) for name, value in native.values().items())
    assert checkpoint.item_ids == tuple(ids)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (None, native.IDS),
        (np.arange(3), (0, 1, 2)),
        (np.arange(3, dtype=">i4"), (0, 1, 2)),
        (np.array(["b", "ä"]), ("b", "ä")),
        (np.array([np.int64(5), "x"], dtype=object), (5, "x")),
        ([3, "x"], (3, "x")),
        ((0.5,), (0.5,)),
        (np.zeros((2, 2)), None),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), None),
        ([object()], None),
        ({"a": 1}, None),
        ("abc", None),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_item_ids_of_rectools(ids, expected, protocol, tmp_path, monkeypatch):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: save(*args, pickle_protocol=protocol))
    native.rectools(tmp_path / "a.ckpt", ids=ids)
    found = load_tensors(tmp_path / "a.ckpt").item_ids
    assert found == expected
    assert expected is None or [type(x) for x in found] == [type(x) for x in expected]


def test_extras_are_inert(tmp_path):
    native.recbole(tmp_path / "a.pth")
    checkpoint = load_tensors(tmp_path / "a.pth")
    assert checkpoint.extras["best_valid_score"] == 0.25
    config = checkpoint.extras["config"]
    assert config.callee.key == ("vanished", "Config")
    assert config.state.texts()["values"].texts() == {"model": "SASRec", "hidden_size": 4}


def test_a_module_gives_its_state_dict(tmp_path):
    expected = native.module(tmp_path / "a.pt")
    checkpoint = load_tensors(tmp_path / "a.pt")
    assert checkpoint.names() == list(expected)
    tied = checkpoint["items.weight"], checkpoint["head.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    torch.save({"model": native.Tower(), "epoch": 1}, tmp_path / "b.pt")
    assert load_tensors(tmp_path / "b.pt").names() == list(expected)


def test_one_tensor_is_read_and_not_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    torch.save({"table": torch.ones(1 << 16, 4), "small": torch.arange(4.0)}, path)
    read = []
    original = MappedFile.read
    monkeypatch.setattr(
        MappedFile, "read", lambda file, a, b: read.append(b - a) or original(file, a, b)
    )
    checkpoint = load_tensors(path)
    assert checkpoint.shape("table") == (1 << 16, 4)
    assert checkpoint["small"].tolist() == [0, 1, 2, 3]
    assert sum(read) < 1 << 17 < path.stat().st_size / 8
    read.clear()
    assert checkpoint.rows("table", 5, 7).shape == (2, 4)
    assert read == [32]


def test_the_package_exports_the_reader(tmp_path):
    native.raw(tmp_path / "a.pth")
    assert fk.load_tensors(tmp_path / "a.pth").kind == "state dict"


def test_scalars_and_extra_states_beside_tensors_are_no_tensors(tmp_path):
    state = OrderedDict(a=torch.ones(2), epochs=3, **{"fp8._extra_state": {"scale": [1]}})
    torch.save(state, tmp_path / "a.pth")
    assert load_tensors(tmp_path / "a.pth").names() == ["a"]


ONES = torch.ones(2)
CHOICES = [
    ({"state_dict": {"a": ONES}, "ema": {"a": ONES}}, "nested state dict"),
    ({"model": {"a": ONES}, "mean": ONES}, "nested state dict"),
    ({"net_g": {"a": ONES}, "epoch": 1}, "nested state dict"),
    ({"a": ONES, "model": 1}, "state dict"),
    ({"model": {"a": ONES}, "state_dict": {"a": ONES}}, "in several places: 'state_dict', 'model'"),
    ({"net_g": {"a": ONES}, "net_d": {"a": ONES}}, "in several places: 'net_g', 'net_d'"),
    ({"a": ONES, "net_g": {"b": ONES}}, "'net_g' stands among the tensors and is none"),
    ({"a": ONES, 3: ONES}, "names are no texts"),
    ({"model": {"a": ONES, 3: ONES}}, "names are no texts"),
    ({"state": {0: {"exp_avg": ONES}}}, "holds no tensors by name"),
    (ONES, "holds no tensors by name, but one tensor"),
    ([ONES], "holds no tensors by name, but a list"),
    (native.Config(), "holds no tensors by name, but an object of the class 'Config'"),
]


@pytest.mark.parametrize(("saved", "expected"), CHOICES)
def test_which_tensors_are_the_model_s(saved, expected, tmp_path):
    torch.save(saved, tmp_path / "a.pth")
    if expected.endswith("state dict"):
        checkpoint = load_tensors(tmp_path / "a.pth")
        assert (checkpoint.kind, checkpoint.names()) == (expected, ["a"])
    else:
        with pytest.raises(InputError, match=expected):
            load_tensors(tmp_path / "a.pth")


def test_unknown_names_are_key_errors(tmp_path):
    native.raw(tmp_path / "a.pth")
    checkpoint = load_tensors(tmp_path / "a.pth")
    assert "b" not in checkpoint
    assert checkpoint.get("b") is None
    with pytest.raises(KeyError):
        checkpoint.tensor("b")
