"""JSON, YAML and safetensors headers that somebody sent: read right, or refused in one line."""

from __future__ import annotations

import ast
import json
import os
import struct
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fisherkern.cli.yaml_documents import LinedMapping, parse_yaml, read_yaml
from fisherkern.documents import MAX_DEPTH, parse_json, read_bytes, read_json
from fisherkern.errors import MAX_SHOWN, InputError, shown
from fisherkern.files import read_header, read_tensors

DEEP = 100_000

REFUSED_JSON = {
    "arrays": ("[" * DEEP + "]" * DEEP, "nested too deep"),
    "objects": ('{"a":' * DEEP, "nested too deep"),
    "just too deep": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested deeper than 64"),
    "digits": ('{"a": ' + "9" * 4301 + "}", "a number of 4301 digits"),
    "minus": ("-" + "9" * 5000, "a number of 5000 digits"),
    "65 bits": ("[18446744073709551616]", "a number of 20 digits"),
    "1e999": ("[1e999]", "'1e999' is too large"),
    "NaN": ('{"a": NaN}', "NaN is no number"),
    "-Infinity": ("[-Infinity]", "-Infinity is no number"),
    "half a pair": ('{"a": "\\ud800"}', "half of a surrogate pair in '\\ud800'"),
    "half a pair as a key": ('{"x\\udfff": 1}', "half of a surrogate pair"),
    "twice": ('{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice"),
    "twice inside": ('[{"a": 1, "\\u0061": 2}]', "the key 'a' stands twice"),
    "latin-1": (b'{"a": "\xe9"}', "not UTF-8"),
    "syntax": ('{\n"a": ]\n}', ":2: not valid JSON: Expecting value"),
    "empty": ("", "not valid JSON"),
    "control": ('["a\nb"]', "Invalid control character"),
}


@pytest.mark.parametrize("case", REFUSED_JSON)
def test_json_beyond_the_limits(case, tmp_path):
    text, message = REFUSED_JSON[case]
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        read_json(path)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, 2.5, true, null, "b"]}', "[-9223372036854775808, 18446744073709551615]"]
    + ['["\\ud83d\\ude00", "é", "\\u0000"]', "[" * MAX_DEPTH + "]" * MAX_DEPTH, '"a"', "1e-999"],
)
def test_json_within_the_limits(text):
    assert parse_json("x", text) == json.loads(text)
    assert parse_json("x", "\ufeff" + text) == json.loads(text)


def bomb(levels, width=9):
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


REFUSED_YAML = {
    "nine levels": (bomb(9), ":3: more than 16 aliases"),
    "as members": (bomb(9).replace("a8:", "members:"), "more than 16 aliases"),
    "merge keys": ("a: &a {b: 1}\nc: {<<: [*a, *a]}", None),
    "cycle": ("a: &a [*a]", "nested deeper|recursive"),
    "cycle of mappings": ("a: &a {b: *a}", "recursive|nested"),
    "deep": ("[" * 50_000, "nested deeper than 64"),
    "deep blocks": ("- " * 30_000, "nested deeper than 64"),
    "digits": ("a: " + "9" * 5000, "not valid YAML|too large"),
    "sixty": ("a: 1" + ":59" * 900, "too large"),
    "nan": ("a: .nan", "not finite"),
    "inf": ("a: [-.inf]", "not finite"),
    "a set": ("a: !!set {b}", "is not read"),
    "bytes": ("a: !!binary aGVsbG8=", "is not read"),
    "own tag": ("a: !x 1", "is not read"),
    "a class": ("!!python/object:os.x {}", "is not read"),
    "an empty integer": ("a: !!int ''", "not valid YAML"),
    "an empty number": ("a: !!float ''", "not valid YAML"),
    "a strange truth": ("a: !!bool perhaps", "not valid YAML"),
    "a word as a list": ("a: !!seq b", "not valid YAML"),
    "twice": ("a: 1\nb: 2\na: 1", ":3: the key 'a' stands here twice"),
    "a list as a key": ("? [1]\n: 2", "not a word"),
    "a number as a key": ("1: 2", "the key 1 is not a word"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML"),
    "no UTF-8": (b"a: \xe9", "not UTF-8"),
    "control": ("a: \x07", "not valid YAML"),
    "long": ("a: " + "b" * (1 << 16), "longer than 65,536 bytes"),
}


@pytest.mark.parametrize("case", REFUSED_YAML)
def test_yaml_beyond_the_limits(case, tmp_path):
    text, message = REFUSED_YAML[case]
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    tracemalloc.start()
    started = time.process_time()
    if message is None:  # "<<" is a word like any other
        assert read_yaml(path)["c"] == {"<<": [{"b": 1}, {"b": 1}]}
    else:
        with pytest.raises(InputError, match=message) as error:
            read_yaml(path)
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300
    assert time.process_time() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_yaml_within_the_limits():
    value = parse_yaml("x", "a: &a [1, 1e-3, no, ~, 2024-02-30, b]\nc: *a\nd: {e: {f: 'g'}}")
    assert value == {
        "a": [1, 1e-3, False, None, "2024-02-30", "b"],
        "c": [1, 1e-3, False, None, "2024-02-30", "b"],
        "d": {"e": {"f": "g"}},
    }
    assert isinstance(value["d"], LinedMapping) and value["d"]["e"].lines == {"f": 3}


@pytest.mark.parametrize("read", [read_json, read_yaml, lambda path: read_bytes(path, 10)])
def test_only_regular_files_are_opened(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "folder", tmp_path / "link", "/dev/null"):
        with pytest.raises(InputError, match="not a regular file"):
            read(path)
    for path, message in (
        (tmp_path / "gone", "no such file"),
        (tmp_path / ("a" * 300), "File name too long"),
        ("a\0b", "embedded null byte"),
        (tmp_path / "loop", "symbolic links"),
    ):
        (tmp_path / "loop").unlink(missing_ok=True)
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(InputError, match=message):
            read(path)


def test_a_pipe_with_a_writer_is_refused_as_well(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: os.close(os.open(pipe, os.O_RDWR)), daemon=True)
    writer.start()
    with pytest.raises(InputError, match="not a regular file"):
        read_json(pipe)


def test_safetensors_headers_go_through_it(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path, {"fisherkern": "[" * DEEP})
    with pytest.raises(InputError, match="metadata.*nested too deep"):
        read_tensors(path)
    for text in ('{"fisherkern": NaN}', '{"a": 1, "a": 1}', "[" * DEEP):
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
        with pytest.raises(InputError), path.open("rb", buffering=0) as stream:
            read_header(stream, path)
        with pytest.raises(InputError):
            read_tensors(path)


def test_a_tensor_that_pytorch_cannot_count_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "F32", "shape": [1 << 61, 1 << 61, 0], "data_offsets": [0, 0]}
    text = json.dumps({"a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(InputError, match="strange shape"):
        read_tensors(path)


def nested(depth):
    value = [1]
    for _ in range(depth):
        value = [value] * 9
    return value


class Loud:
    def __repr__(self):
        raise RuntimeError("never called")


class Odd(dict):
    def __repr__(self):
        raise RuntimeError("never called")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", "'a'"),
        ("a\nb\x1b[31m", r"'a\nb\x1b[31m'"),
        ("x" * 10**6, "'" + "x" * 76 + "..."),
        ("\ud800", r"'\ud800'"),
        (3, "3"),
        (True, "True"),
        (None, "None"),
        (1.5, "1.5"),
        (10**4000, "an integer of 4001 digits"),
        ([1, [2, [3, [4]]]], "[1, [2, [3, [...]]]]"),
        (nested(200), None),
        ({"a": 1, "b": (2,)}, "{'a': 1, 'b': (2,)}"),
        (Odd(a=1), "{'a': 1}"),
        ({}, "{}"),
        (Loud(), "a Loud"),
        (torch.nn.Linear(1, 1), "a Linear"),
        (torch.zeros(1000), "a Tensor"),
        (torch.float32, "torch.float32"),
        (list(range(10**6)), "[0, 1, 2, 3, ...]"),
        (b"\xff" * 1000, None),
        (int, "class int"),
    ],
)  # fmt: skip
def test_a_value_is_shown_short_and_on_one_line(value, expected):
    text = shown(value)
    assert len(text) <= MAX_SHOWN and text.isprintable()
    assert expected is None or text == expected[: MAX_SHOWN - 3] + "..." or text == expected


def test_a_message_is_one_short_line():
    error = InputError("a\nb\r\x1b[2J\u2028\ud800: " + "x" * 10_000 + " at the end")
    text = str(error)
    assert text.isprintable() and len(text) < 1100 and text.endswith("at the end")
    assert text.startswith(r"a\nb\r\x1b[2J\u2028\ud800: xxx")


# Names of tensors, methods and formats: strings, which a message cuts to its own length.
STRINGS = {
    *("name", "names[0]", "lacking[0]", "tie.name", "alias", "own", "min(held)", "min(odd)"),
    *("group[0]", "groups[-1][0]", "self.sampler", "self.mode", "ENSEMBLE", "by", "form"),
}


def quoted(source: str) -> list[str]:
    """What messages of InputError quote by `!r`, as unbounded as it is."""
    raised = [
        node.exc
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Raise) and "InputError" in ast.unparse(node.exc or node)
    ]
    return [
        ast.unparse(part.value)
        for call in raised
        for part in ast.walk(call)
        if isinstance(part, ast.FormattedValue) and part.conversion == ord("r")
    ]


def test_messages_quote_values_by_shown():
    found = {
        f"{path.name}: {text}"
        for path in (Path(__file__).parents[1] / "fisherkern").rglob("*.py")
        for text in quoted(path.read_text(encoding="utf-8"))
        if text not in STRINGS
    }
    assert found == set()
    assert quoted("raise InputError(f'{path}: {value!r}')") == ["value"]
