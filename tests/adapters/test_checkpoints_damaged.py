"""Damaged files, hostile headers and hostile indices are refused in one sentence."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile

import native_checkpoints as native
import pytest
import torch

from fisherkern.adapters import load_tensors
from fisherkern.errors import InputError


def damaged(content, rng):
    """`content` with bytes flipped, cut off, put in or repeated."""
    content, kind = bytearray(content), rng.random()
    first, length = rng.randrange(len(content)), rng.randrange(1, 30)
    if kind < 0.15:
        return bytes(content[:first])
    if kind < 0.25:
        return bytes(content[:first] + rng.randbytes(length) + content[first:])
    if kind < 0.35:
        return bytes(content[:first] + content[first + length :])
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(content))
        content[place] = rng.choice((rng.randrange(256), content[place] ^ 1 << rng.randrange(8)))
    return bytes(content)


def damaged_program(content, rng):
    """A right archive of a pickle that is damaged."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, damaged(part, rng) if name.endswith("data.pkl") else part)
    return result.getvalue()


FILES = [name for name in native.KINDS if "." in name]


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    native.KINDS[name][1](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    rng, refused = random.Random(name), 0
    for number in range(40):
        program = number % 2 and content.startswith(b"PK")
        case = (damaged_program if program else damaged)(content, rng)
        path = tmp_path / f"{number}_{name}"
        path.write_bytes(case)
        try:
            checkpoint = load_tensors(path)
            for tensor_name in checkpoint:
                checkpoint[tensor_name].clone()
        except InputError as error:
            refused += 1
            assert len(str(error)) < 600 and "\n" not in str(error)
    assert refused > 5


def entry(**changes):
    """The header of a file of one tensor, right but for `changes`."""
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes})


TWO = {"dtype": "F32", "shape": [2]}
# name -> (header, bytes behind it, message)
HEADERS = {
    "deep": ("[" * 100_000, 8, "not valid JSON: nested too deep"),
    "digits": ('{"a":' + "9" * 5000 + "}", 8, "not valid JSON: a number of 5000 digits"),
    "broken": ('{"a"', 8, "not valid JSON: Expecting"),
    "no text": ('{"\udcff":1}', 8, "not valid JSON"),
    "no object": ("[1]", 8, "not a whole safetensors file"),
    "no shape": ('{"a":{"dtype":"F32","data_offsets":[0,8]}}', 8, "not a whole"),
    "overlap": (
        json.dumps({name: TWO | {"data_offsets": [0, 8]} for name in "ab"}), 16, "overlap, or"
    ),
    "gap": (json.dumps({"a": TWO | {"data_offsets": [8, 16]}}), 16, "overlap, or leave gaps"),
    "more bytes": (entry(), 9, "not a whole"),
    "fewer bytes": (entry(), 7, "not a whole"),
    "size": (entry(shape=[3]), 8, "tensor 'a' does not fit its place"),
    "type": (entry(dtype="F99"), 8, "is of the unknown type 'F99'"),
    "type list": (entry(dtype=["F32"]), 8, "is of the unknown type ['F32']"),
    "float": (entry(shape=[2.0]), 8, "strange shape"),
    "negative": (entry(shape=[-2], data_offsets=[8, 0]), 8, "strange shape"),
    "nan": (entry(shape=[float("nan")]), 8, "not valid JSON: NaN"),
    "huge": (entry(shape=[1 << 62, 1 << 62]), 8, "strange shape"),
    "dimensions": (entry(shape=[1] * 70 + [2]), 8, "has a strange shape"),
    "metadata": ('{"__metadata__":{"a":1}}', 0, "not a whole"),
    "nothing": ("{}", 0, "holds no tensors"),
    "long name": (entry(dtype="x" * 9000), 8, "xxx..."),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_safetensors_headers(case, tmp_path):
    text, count, message = HEADERS[case]
    header, path = text.encode("utf-8", "surrogateescape"), tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(count))
    with pytest.raises(InputError) as raised:
        load_tensors(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "../a.safetensors"}, "not a file beside it"),
        ({"a": "/etc/passwd"}, "not a file beside it"),
        ({"a": "x\\y"}, "not a file beside it"),
        ({"a": ".."}, "not a file beside it"),
        ({"a": 3}, "not a file beside it"),
        ({"a": "missing.safetensors"}, "the shard 'missing.safetensors' is missing"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"a": "one.safetensors"}, "'b' stands in one.safetensors and not in"),
        ({"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"}, "'c' stands in"),
        (
            {"a": "one.safetensors", "b": "two.safetensors"},
            "'b' stands in one.safetensors and not in",
        ),
    ],
)
def test_hostile_indices(places, message, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    pair = {"a": torch.ones(2), "b": torch.ones(2)}
    torch.manual_seed(0)
    for name in ("one", "two"):
        native.safetensors.torch.save_file(pair, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match=message):
        load_tensors(folder)


@pytest.mark.parametrize("content", ["[1]", "[" * 100_000, "{", '{"a":' + "9" * 5000 + "}", "\x80"])
def test_hostile_configs(content, tmp_path):
    native.KINDS["hf"][1](tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match="config.json"):
        load_tensors(tmp_path / "hf")
