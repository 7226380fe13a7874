"""Changes of files that keep enough of their form to get past the first check."""

from __future__ import annotations

import json
import random
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from typing import Any

# What no writer writes: wrong types, sizes beyond all limits, what other formats allow.
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 1.0, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    2**31, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**12, 10**23, 10**4000, "", "a", "\n", "\0",
    "\ud800", "x" * 100_000, "../../x", "/dev/zero", "<script>", [], {}, [[]], [None], ["a"],
    {"class": "BERT4Rec"}, {"a": {"b": []}}, [1, 2, 3], "1", "nan", "model", "training",
)  # fmt: skip
TOKENS = (
    b"\0", b"\n", b"\r\n", b"\xff", b"\xef\xbb\xbf", b'"', b"'", b"{", b"}", b"[", b"]", b",",
    b";", b"\t", b"::", b": ", b"- ", b"&a ", b"*a ", b"<<: ", b"!!", b"!!int ", b"? ", b"| ",
    b"-1", b"0", b"1e999", b"nan", b"inf", b"None", b"true", b"9" * 30, b"9" * 5000, b"\xd8\x00",
    b"\x1b[31m", b"2024-13-41", b"[" * 3000, b'{"a":' * 3000, b"\x80\x02", b"PK\x03\x04", b"PAR1",
)  # fmt: skip


def mutated(content: bytes, random: random.Random) -> bytes:
    """Return `content` after one to three changes of a kind that its form allows."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        kinds: list[Callable[[bytes, Any], bytes]] = [_bytes, _bytes]
        if content[8:9] == b"{":
            kinds += [_header] * 6
        elif content[:1] in (b"{", b"["):
            kinds += [_json] * 4
        elif content[:2] == b"PK":
            kinds += [_zip] * 2
        content = random.choice(kinds)(content, random)
    return content


def _bytes(content: bytes, random: random.Random) -> bytes:
    if not content:
        return random.choice(TOKENS)
    start = random.randrange(len(content))
    stop = min(len(content), start + random.choice((1, 1, 2, 4, 8, 100)))
    part = content[start:stop]
    new = random.choice(
        (
            lambda: bytes(byte ^ (1 << random.randrange(8)) for byte in part[:1]) + part[1:],
            lambda: bytes(random.randrange(256) for _ in part),
            lambda: b"",
            lambda: part * random.choice((2, 3, 50)),
            lambda: random.choice(TOKENS),
            lambda: random.choice(TOKENS) + part,
            lambda: content[(other := random.randrange(len(content))) : other + len(part)],
            lambda: struct.pack("<q", random.choice((-1, 0, 1, 2**31, 2**62))),
        )
    )()
    if random.random() < 0.1:
        return content[:start]
    return content[:start] + new + content[stop:]


def _json(content: bytes, random: random.Random) -> bytes:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes(content, random)
    return _dumped(_changed(tree, random))


def _dumped(tree: Any) -> bytes:
    """Return JSON of everything, infinities and halves of pairs included."""
    return json.dumps(tree, default=str).replace(json.dumps(10**4000), "9" * 4400).encode()


def _changed(tree: Any, random: random.Random) -> Any:
    """Return the tree with one value, key or entry changed."""
    if isinstance(tree, dict) and tree and random.random() < 0.85:
        name = random.choice(list(tree))
        change = random.random()
        if change < 0.1:
            return {key: value for key, value in tree.items() if key != name}
        if change < 0.15:
            return {**tree, random.choice(("more", "", "__metadata__", "class")): tree[name]}
        return {**tree, name: _changed(tree[name], random)}
    if isinstance(tree, list) and tree and random.random() < 0.7:
        place = random.randrange(len(tree))
        change = random.random()
        if change < 0.1:
            return tree[:place] + tree[place + 1 :]
        if change < 0.2:
            return tree[:place] + tree[place : place + 1] * random.choice((2, 70)) + tree[place:]
        return [*tree[:place], _changed(tree[place], random), *tree[place + 1 :]]
    if isinstance(tree, str) and tree[:1] == "{" and random.random() < 0.9:
        try:  # fisherkern's own part of a header
            return _dumped(_changed(json.loads(tree), random)).decode()
        except (ValueError, RecursionError):
            return tree[1:]
    if isinstance(tree, int) and not isinstance(tree, bool) and random.random() < 0.4:
        return tree + random.choice((-1, 1, 8, 1000))
    return random.choice(STRANGE)


def _header(content: bytes, random: random.Random) -> bytes:
    """Change the header of a safetensors file; its length fits, mostly."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError, OverflowError):
        return _bytes(content, random)
    if isinstance(header, dict) and "__metadata__" in header and random.random() < 0.6:
        header = {**header, "__metadata__": _changed(header["__metadata__"], random)}
    else:
        header = _changed(header, random)
    text = _dumped(header)
    size = len(text) if random.random() < 0.95 else random.choice((0, 1, 2**20, 2**63 - 1))
    return struct.pack("<Q", size) + text + content[8 + length :]


def _zip(content: bytes, random: random.Random) -> bytes:
    """Change a part of an archive, and write the archive whole again."""
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            parts = {info.filename: archive.read(info) for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OSError, EOFError):
        return _bytes(content, random)
    except Exception:  # noqa: BLE001  # zipfile's own troubles with what was changed before
        return _bytes(content, random)
    if not parts:
        return _bytes(content, random)
    pickles = [name for name in parts if name.endswith(".pkl")]
    name = random.choice(pickles if pickles and random.random() < 0.8 else list(parts))
    parts[name] = _bytes(parts[name], random)
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", random.choice((0, 8))) as archive:
        for own, data in parts.items():
            archive.writestr(own, data)
    return packed.getvalue()
