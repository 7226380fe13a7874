"""Files that cannot be merged: one sentence that names what is wrong, and nothing written."""

import json
import os
import signal
import struct
import sys

import pytest
import safetensors.torch
import torch
from helpers.merging_files import saved, saved_fisher

from fisherkern.errors import InputError
from fisherkern.fisher import DiagFisher
from fisherkern.merging.files import moved_rows, streaming, tensor_files
from fisherkern.merging.files.streaming import merge_files


def rewritten(path, change, data=None):
    """The file with its header's dict changed, and its data too if given."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(text)) + text + (content[8 + length :] if data is None else data)
    )


def overlap(header):
    header["b"]["data_offsets"] = header["a"]["data_offsets"]


HOSTILE = {
    "huge length": lambda path: path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}" * 50),
    "length past the end": lambda path: path.write_bytes(struct.pack("<Q", 5000) + b"{}"),
    "empty": lambda path: path.write_bytes(b""),
    "no JSON": lambda path: path.write_bytes(struct.pack("<Q", 4) + b"{{{{"),
    "overlap": lambda path: rewritten(path, overlap),
    "past the end": lambda path: rewritten(
        path, lambda header: header["b"].update(data_offsets=[16, 1 << 40], shape=[1 << 38])
    ),
    "negative": lambda path: rewritten(path, lambda h: h["a"].update(data_offsets=[-4, 12])),
    "shape is not the size": lambda path: rewritten(path, lambda h: h["a"].update(shape=[9])),
    "unknown type": lambda path: rewritten(path, lambda h: h["a"].update(dtype="F31")),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "data too long": lambda path: path.write_bytes(path.read_bytes() + b"1234"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_file_is_refused_in_one_sentence(fault, tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path in paths:
        safetensors.torch.save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    HOSTILE[fault](paths[1])
    with pytest.raises(InputError, match="1.safetensors:.* (not|overlap|unknown)") as error:
        merge_files(paths, tmp_path / "out.safetensors")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1000)}, path)
    with tensor_files.opened([path]) as ((file,),):
        assert torch.equal(file.rows("a", 0, 10), torch.ones(10))
        with path.open("r+b") as stream:
            stream.truncate(1000)
        with pytest.raises(InputError, match="x.safetensors: became shorter while it was read"):
            file.rows("a", 0, 1000)


def one_tensor(tmp_path, *tensors):
    paths = []
    for number, tensor in enumerate(tensors):
        paths.append(tmp_path / f"{number}.safetensors")
        safetensors.torch.save_file(tensor, paths[-1])
    return paths


A = {"a": torch.arange(40.0).reshape(20, 2)}


def with_value(value):
    changed = A["a"].clone()
    changed[17, 1] = value
    return {"a": changed}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (with_value(torch.nan), "1.safetensors: tensor 'a' holds a NaN"),
        (with_value(torch.inf), "1.safetensors: tensor 'a' holds an infinity"),
        ({"a": torch.ones(20, 3)}, r"1.safetensors: tensor 'a' has shape \(20, 3\) and in "),
        ({"a": A["a"].double()}, "1.safetensors: tensor 'a' is F64 and in .*0.safetensors F32"),
        ({**A, "b": torch.ones(1)}, "0.safetensors: tensor 'b' is missing, which .*1.safetensors"),
        ({"b": torch.ones(1)}, "1.safetensors: tensor 'a' is missing|tensor 'b' is missing"),
        ({"a": A["a"].to(torch.float8_e4m3fn)}, "tensor 'a' is F8_E4M3, which cannot be merged"),
    ],
)
def test_members_that_do_not_fit_are_named_and_nothing_is_left(other, message, tmp_path):
    paths = one_tensor(tmp_path, A, other)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"what was there")
    with pytest.raises(InputError, match=message):
        merge_files(paths, out)
    assert out.read_bytes() == b"what was there"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["0.safetensors", "1.safetensors", "out.safetensors"]


def test_integers_must_agree(tmp_path):
    paths = one_tensor(tmp_path, {"n": torch.tensor([1, 2])}, {"n": torch.tensor([1, 3])})
    with pytest.raises(InputError, match="1.safetensors: tensor 'n' differs from that of .*int64"):
        merge_files(paths, tmp_path / "out.safetensors")


def test_what_is_equal_is_decided_for_the_whole_tensor(tmp_path, monkeypatch):
    """In the first block the two agree; a mask that is averaged may not hold infinities."""
    monkeypatch.setattr(streaming, "READ", 4)
    one = torch.full((20,), -torch.inf)
    two = one.clone()
    two[17] = 0.0
    out = tmp_path / "out.safetensors"
    with pytest.raises(InputError, match="0.safetensors: tensor 'mask' holds an infinity"):
        merge_files(one_tensor(tmp_path, {"mask": one}, {"mask": two}), out)
    merge_files(one_tensor(tmp_path, {"mask": one}, {"mask": one}), out)
    assert torch.equal(safetensors.torch.load_file(out)["mask"], one)
    numbers = torch.arange(20)
    changed = numbers.clone()
    changed[17] = 0
    with pytest.raises(InputError, match="1.safetensors: tensor 'n' differs"):
        merge_files(one_tensor(tmp_path, {"n": numbers}, {"n": changed}), out)


def test_arguments_that_do_not_fit_are_named(tmp_path):
    paths = one_tensor(tmp_path, A, A)
    out = tmp_path / "out.safetensors"
    for arguments, message in (
        ({"paths": []}, "there is no model to merge"),
        ({"paths": paths[0]}, "0.safetensors: one file where several were expected"),
        ({"seed": -1}, "seed must not be negative"),
        ({"weights": {0: 3.0, 1: 1.0}}, "2 numbers were expected"),
        ({"paths": [tmp_path / "none.safetensors"]}, "none.safetensors: no such file"),
        ({"out": tmp_path / "out.bin"}, "must end in .safetensors"),
        ({"out": paths[1]}, "1.safetensors: is one of the files that are merged"),
        ({"method": "regmean"}, "method 'regmean' is not one that files merge by"),
        ({"weights": "search"}, "takes numbers as weights"),
        ({"weights": [1]}, "weights has 1 numbers for 2 members"),
        ({"method": "weighted"}, "method 'weighted' needs weights"),
        ({"floor": -1}, "floor is -1"),
        ({"fishers": paths}, "0.safetensors: not a Fisher file"),
        ({"fishers": paths[:1]}, "there are 1 fishers for 2 members"),
        ({"method": "task_arithmetic"}, "needs base"),
        (
            {"method": "fisher", "fishers": paths, "options": {"group": "head"}},
            "option 'group' is 'head', and files do not say",
        ),
    ):
        with pytest.raises(InputError, match=message):
            merge_files(**{"paths": paths, "out": out, **arguments})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_models_that_do_not_fit_are_named(tmp_path):
    path, _ = saved(tmp_path, 0)
    out = tmp_path / "out.safetensors"
    other, _ = saved(tmp_path, 1, heads=3)
    with pytest.raises(InputError, match="member 1 was built with heads=3"):
        merge_files([path, other], out)
    other, _ = saved(tmp_path, 1, "GRU4Rec")
    with pytest.raises(InputError, match="is missing, which|is a GRU4Rec model"):
        merge_files([path, other], out)
    path.with_suffix(".json").write_text('{"item_ids": ["x"]}')
    with pytest.raises(InputError, match="m0.json: its item_ids are not those of m0.safetensors"):
        merge_files([path, path], out)


def test_fishers_that_do_not_fit_are_named(tmp_path):
    path, model = saved(tmp_path, 0)
    own, fisher = saved_fisher(tmp_path, 0, model)
    other, _ = saved_fisher(tmp_path, 1, saved(tmp_path, 1)[1])
    out = tmp_path / "out.safetensors"
    with pytest.raises(InputError, match="f1.safetensors: was computed on another model"):
        merge_files([path, path], out, fishers=[own, other])
    merge_files([path, path], out, fishers=[own, other], check_fingerprint=False)

    def fails(change, message):
        tensors = {name: value.clone() for name, value in fisher.items()}
        change(tensors)
        bad = tmp_path / "bad.safetensors"
        DiagFisher(tensors, {}).save(bad)
        with pytest.raises(InputError, match=message):
            merge_files([path], out, fishers=[bad])

    fails(lambda t: t.pop("output_bias"), "bad.safetensors: tensor 'output_bias' is missing")
    fails(lambda t: t.update(x=torch.ones(1)), "tensor 'x' is none of .*m0.safetensors's param")
    fails(lambda t: t.update(output_bias=torch.ones(3)), r"has shape \(3,\) where the member's")
    fails(lambda t: t["output_bias"].fill_(-1), "'output_bias' holds a negative value")
    fails(lambda t: t["output_bias"][2:3].fill_(torch.nan), "'output_bias' holds a value that is")
    fails(lambda t: [v.zero_() for v in t.values()], "bad.safetensors: the Fisher is zero every")


@pytest.mark.skipif(sys.platform != "linux", reason="limits and kills of Linux")
@pytest.mark.parametrize("ids", ["abcdefghijkxy", "kxacbfyedghij"], ids=["one order", "two orders"])
@pytest.mark.parametrize("limit", [100, 5000])
def test_a_full_disk_leaves_nothing(limit, ids, tmp_path, monkeypatch):
    """In the header, and in the middle of the rows or of their copy."""
    import resource

    monkeypatch.setattr(moved_rows, "_is_scattered", lambda *arguments: True)
    paths = [saved(tmp_path, n, ids=own)[0] for n, own in enumerate(("abcdefghijkxy", ids))]
    before = sorted(p.name for p in tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with pytest.raises(InputError, match="could not be written: File too large") as error:
            merge_files(paths, tmp_path / "out.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed")
def test_a_merge_killed_in_the_middle_is_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(moved_rows, "_is_scattered", lambda *arguments: True)
    paths = [saved(tmp_path, n, ids=ids)[0] for n, ids in enumerate(("abcdefg", "gfedcba"))]
    out = tmp_path / "out.safetensors"
    merge_files(paths, out)
    expected = out.read_bytes()
    out.write_bytes(b"what was there")
    child = os.fork()
    if not child:
        whole = streaming.StreamingMerge.blocks

        def blocks(self, name, part=None):
            yield from whole(self, name, part)
            if "item_embedding" in name:
                os.kill(os.getpid(), signal.SIGKILL)

        streaming.StreamingMerge.blocks = blocks
        try:
            merge_files(paths, out)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert out.read_bytes() == b"what was there"
    assert len(list(tmp_path.iterdir())) == 8  # with a temporary file
    merge_files(paths, out)
    assert out.read_bytes() == expected
    assert len(list(tmp_path.iterdir())) == 7
