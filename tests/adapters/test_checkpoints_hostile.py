"""Files that somebody sent: nothing of them runs, and whatever is wrong is one sentence."""

from __future__ import annotations

import builtins
import contextlib
import copyreg
import functools
import io
import operator
import os
import posixpath
import struct
import sys
import zipfile

import native_checkpoints as native
import numpy as np
import pytest
import torch

from fisherkern.adapters import load_tensors
from fisherkern.adapters.files import pickles, torch_files
from fisherkern.errors import InputError


class Call:
    """Pickles as a call of `function`: what a hostile file is made of."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


def attacks(flag):
    """Ways to make `flag` by loading a pickle."""
    command, code = f"touch {flag}", f"open({str(flag)!r}, 'w')"
    system = Call(getattr, Call(__import__, "os"), "system")
    return {
        "os.system": Call(os.system, command),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "getattr chain": Call(operator.call, system, command),
        "attrgetter": Call(operator.call, Call(operator.attrgetter("system"), os.system), command),
        "torch.load": Call(torch.serialization.load, str(flag)),
        "reconstructor": Call(copyreg._reconstructor, native.Config, object, None, state={"a": 1}),
        "partial": Call(functools.partial(os.system, command)),
        "partial state": Call(functools.partial, print, state=(os.system, (command,), {}, None)),
        "map": Call(list, Call(map, os.system, [command])),
        "setstate": Call(native.Config, state={"a": 1}),
        "load_from_bytes": Call(torch.storage._load_from_bytes, b"\x80\x02cos\nsystem\n."),
        "import": Call(__import__, "this"),
        "compile": Call(builtins.compile, code, "x", "exec"),
        "numpy": Call(np.lib.format.open_memmap, str(flag), "w+", "<f4", (2,)),
        "rebuild": Call(torch._utils._rebuild_tensor_v2, Call(os.system, command), 0, (1,), (1,)),
        "size": Call(torch.Size, Call(os.system, command)),
    }


EVENTS: list[str] | None = None
WATCHED = ("import", "exec", "compile", "os.system", "subprocess.Popen", "pickle.find_class")


def _hook(event, args):
    if EVENTS is not None and event in WATCHED:
        EVENTS.append(f"{event} {args}")


sys.addaudithook(_hook)  # a hook stays for good, and does nothing outside `watched`


@contextlib.contextmanager
def watched():
    """The list of everything that is imported, compiled or run inside."""
    global EVENTS
    EVENTS = events = []
    try:
        yield events
    finally:
        EVENTS = None


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """Whatever PyTorch imports on first use is imported before anything is watched."""
    path = tmp_path_factory.mktemp("warm") / "a.pth"
    native.raw(path)
    dict(load_tensors(path))


PLACES = {
    "beside": lambda attack: {"state_dict": native.values(), "config": attack},
    "among": lambda attack: {**native.values(), "x": attack},
    "alone": lambda attack: attack,
    "key": lambda attack: {"state_dict": native.values(), "list": [attack, {"a": attack}]},
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("attack", attacks("x"))
def test_an_attack_runs_nothing(attack, place, old, tmp_path):
    flag, path = tmp_path / "flag", tmp_path / "a.pth"
    saved = PLACES[place](attacks(flag)[attack])
    torch.save(saved, path, _use_new_zipfile_serialization=not old)
    native.RAN.clear()
    before = dict(sys.modules)
    with watched() as events:
        try:
            result = dict(load_tensors(path))
        except InputError as error:
            result = error
    assert events == []
    assert native.RAN == []
    assert not flag.exists()
    assert dict(sys.modules) == before
    if place in ("among", "alone"):
        assert isinstance(result, InputError)
    elif attack not in ("rebuild", "size"):  # these break a function that we know
        assert all(native.same(result[name], value) for name, value in native.values().items())


def zipped(program, **entries):
    """A torch.save archive with this pickle program."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a/data.pkl", program)
        for name, data in entries.items():
            archive.writestr(posixpath.normpath(f"a/data/{name.removeprefix('s')}"), data)
    return content.getvalue()


def tensor(
    shape=(2,), stride=(1,), offset=0, count=2, key="0", kind="FloatStorage", function="_v2"
):
    """The opcodes of {"a": a tensor}; sizes as given, right or wrong."""

    def number(n):
        raw = n.to_bytes(10, "little", signed=True)
        return b"\x8a\x0a" + raw

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = (
        b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\n"
        b"X" + struct.pack("<I", len(key)) + key.encode() + b"X\x03\x00\x00\x00cpu"
    )
    return (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor" + function.encode() + b"\n("
        + storage + number(count) + b"tQ" + number(offset) + numbers(shape) + numbers(stride)
        + b"\x89}tRs."
    )  # fmt: skip


FLOATS = struct.pack("<2f", 1, 2)
WRONG = {
    "no file of that kind": (b"hello", "neither"),
    "empty": (b"", "neither"),
    "zip of something else": (zipped(b"N."), "holds no tensors by name, but a NoneType"),
    "zip cut short": (zipped(tensor(), s0=FLOATS)[:-10], "not a whole zip file"),
    "program cut short": (zipped(tensor()[:-5], s0=FLOATS), "its pickle"),
    "no storage": (zipped(tensor()), "storage '0', which is missing"),
    "storage elsewhere": (zipped(tensor(key="../data.pkl"), s0=FLOATS), "which is missing"),
    "another size": (zipped(tensor(count=1 << 60), s0=FLOATS), "to have another size"),
    "beyond its storage": (zipped(tensor(shape=(3,)), s0=FLOATS), "reaches beyond its storage"),
    "offset": (zipped(tensor(offset=1), s0=FLOATS), "reaches beyond its storage"),
    "negative offset": (zipped(tensor(offset=-1), s0=FLOATS), "strange shape"),
    "negative stride": (zipped(tensor(stride=(-1,)), s0=FLOATS), "strange shape"),
    "expanded without end": (zipped(tensor((1 << 60,), (0,)), s0=FLOATS), "by far"),
    "huge stride": (zipped(tensor(stride=(1 << 70,)), s0=FLOATS), "strange shape"),
    "lengths differ": (zipped(tensor(shape=(1, 2)), s0=FLOATS), "strange shape"),
    "unknown storage": (zipped(tensor(kind="ShellStorage"), s0=FLOATS), "'ShellStorage'"),
    "quantised": (zipped(tensor(kind="QInt8Storage"), s0=b"ab"), "'a' is quantised"),
    "untyped": (zipped(tensor(kind="UntypedStorage"), s0=b"ab"), "without a type"),
    "long integer": (zipped(b"\x8b\xff\xff\xff\x7fabc."), "an integer of 2147483647 bytes"),
    "digits": (zipped(b"I" + b"9" * 5000 + b"\n."), "a number of 5000 digits"),
    "long text": (zipped(b"\x8d" + b"\xff" * 8 + b"a."), "ends too early"),
    "no mark": (zipped(b"NNt."), "misses a mark"),
    "mark as value": (zipped(b"(."), "a mark for a value"),
    "empty stack": (zipped(b"."), "is broken at byte"),
    "unknown memo": (zipped(b"h\x07."), "is broken at byte"),
    "extension registry": (zipped(b"\x82\x01."), "which is never data"),
    "no stop": (zipped(b"N"), "is broken at byte"),
    "persistent text": (zipped(b"Pstorage\n."), "which is never data"),
    "cycle": (zipped(b"]q\x00h\x00a."), "holds no tensors by name, but a list"),
    "keys that hash for ever": (zipped(b"})" + b"2\x86" * 90 + b"Ns."), "no tensors"),
    "big-endian": (zipped(b"}.", **{"../byteorder": b"big"}), "on a big-endian machine"),
    "a pickle": (b"\x80\x04N.", "torch.save did not write"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "several places": (
        zipped(
            b"\x80\x02}(X\x01\x00\x00\x00p" + tensor()[2:-1] + b"X\x01\x00\x00\x00q"
            + tensor()[2:-1] + b"u.", s0=FLOATS,
        ),
        "in several places: 'p', 'q'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence(case, tmp_path):
    content, message = WRONG[case]
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        load_tensors(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_hand_made_program_is_right_when_nothing_is_wrong(tmp_path):
    (tmp_path / "a.pth").write_bytes(zipped(tensor(), s0=FLOATS))
    assert load_tensors(tmp_path / "a.pth")["a"].tolist() == [1, 2]


def test_too_many_opcodes(monkeypatch):
    with pytest.raises(pickles.PickleError, match="more than 100 opcodes"):
        pickles.run_program(b"N" * 101 + b".", limit=100)
    assert pickles.run_program(b"N" * 99 + b".", limit=100) == (None, 100)


def test_deep_nests_are_freed():
    value, _ = pickles.run_program(b")" + b"\x85" * 300_000 + b".")
    del value
    value, _ = pickles.run_program(b")" + b"q\x010ca\nb\nh\x01\x85R" * 50_000 + b".")
    del value


def test_a_compressed_archive_is_read_and_a_bomb_is_not(tmp_path):
    path = tmp_path / "a.pth"
    native.raw(path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    checkpoint = load_tensors(path)
    for name, value in native.values().items():
        assert native.same(checkpoint[name], value)
    rows = checkpoint.rows("layer.weight", 1, 3)
    assert native.same(rows, native.values()["layer.weight"][1:3])
    tied = checkpoint["item_embedding.weight"], checkpoint["output.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", tensor(shape=(1 << 20,), count=1 << 20))
        archive.writestr("a/data/0", bytes(1 << 22))
    with pytest.raises(InputError, match="compressed beyond all reason"):
        load_tensors(path)


def test_an_archive_of_millions_of_parts(tmp_path, monkeypatch):
    native.raw(tmp_path / "a.pth")
    monkeypatch.setattr(torch_files, "MAX_DIRECTORY", 100)
    with pytest.raises(InputError, match="too many parts"):
        load_tensors(tmp_path / "a.pth")


def test_entries_twice_or_one_over_the_other(tmp_path):
    path = tmp_path / "a.pth"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data.pkl", tensor())
        archive.writestr("a/data/0", FLOATS)
        archive.writestr("a/data/0", FLOATS)
    path.write_bytes(content.getvalue())
    with pytest.raises(InputError, match="twice"):
        load_tensors(path)
    # Both of the second's directory entries point at the first's bytes.
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a/data.pkl", b"}.")
        for number in range(20):
            archive.writestr(f"a/data/{number}", bytes(500))
            archive.filelist[-1].header_offset = archive.filelist[1].header_offset
    cut = content.getvalue()
    start, directory = cut.index(b"a/data/1") - 30, cut.index(b"PK\x01\x02")
    moved = bytearray(cut[:start] + cut[directory:])
    end = moved.rindex(b"PK\x05\x06")
    moved[end + 16 : end + 20] = struct.pack("<I", start)
    path.write_bytes(moved)
    with pytest.raises(InputError, match="not a whole zip"):
        load_tensors(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda one: one.to_sparse(), "'x' is sparse"),
        (lambda one: one.to_sparse_csr(), "'x' is sparse"),
        (lambda one: one.to("meta"), "'x' is without values"),
        (lambda one: one.to(torch.complex64).conj(), "'x' is a conjugate"),
        (lambda one: [one], "'x' stands among the tensors"),
        (lambda one: torch.quantize_per_tensor(one, 0.1, 0, torch.qint8), "'x' is quantised"),
    ],
    ids=["sparse", "csr", "meta", "conjugate", "list", "quantised"],
)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_merged(value, message, old, tmp_path):
    path, value = tmp_path / "a.pth", value(torch.eye(3))
    torch.save({"a": torch.ones(2), "x": value}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(InputError, match=message):
        load_tensors(path)
    # Beside the state they hurt nobody.
    saved = {"state_dict": {"a": torch.ones(2)}, "optimizer": {"x": value}}
    torch.save(saved, path, _use_new_zipfile_serialization=not old)
    assert load_tensors(path)["a"].tolist() == [1, 1]


def test_places_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for name in ("missing.pth", "pipe.pth", "x\0y.pth", "n" * 300 + ".pth"):
        with pytest.raises(InputError):
            load_tensors(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        load_tensors("/dev/zero")
    with pytest.raises(InputError, match="a folder without model.safetensors or"):
        load_tensors(tmp_path)


def test_rows_of_a_file_that_became_shorter(tmp_path):
    native.foreign(tmp_path / "a.safetensors")
    checkpoint = load_tensors(tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", 600)
    with pytest.raises(InputError, match="became shorter"):
        for name in checkpoint:
            checkpoint.rows(name, 0, 1)
