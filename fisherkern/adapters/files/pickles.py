"""Pickle programs read as data: nothing that a file names is imported or called.

A pickle is a program for a small stack machine. `run` is that machine, with every power
taken out: a name of a class or function stays a `Global`, a call of one becomes a `Stub` that
keeps its arguments and state, and only the functions in the table that the caller gives, all
of them ours, are ever called. Nothing of a file is hashed, compared or printed either, since
a small nest of tuples can make each of these endless: a dictionary is a list of `Pairs`.

Every opcode takes at least one byte and pushes at most one value, so the stack, the memo and
the objects are bounded by MAX_OPCODES, and texts and bytes by the file.
"""

from __future__ import annotations

import codecs
import gc
import mmap
import struct
from collections.abc import Callable, Mapping
from typing import Any

# A million item ids are two million opcodes; four million take seconds.
MAX_OPCODES = 1 << 22
# Torch's magic number has 10 bytes, the state of a random generator 16.
MAX_INTEGER_BYTES = 1024
MAX_TEXT_BYTES = 1 << 28


class PickleError(ValueError):
    """A program that is broken, too long, or asks for what cannot be data."""


class Global:
    """The name of a class or function, never the thing."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    @property
    def key(self) -> tuple[str, str]:
        return self.module, self.name


class Pairs:
    """A dictionary as its pairs (key, value), in the order in which they were set."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[Any, Any]] | None = None) -> None:
        self.pairs = pairs

    def add(self, pairs: list[tuple[Any, Any]]) -> None:
        if self.pairs is None:
            self.pairs = pairs
        else:
            self.pairs.extend(pairs)

    def texts(self) -> dict[str, Any]:
        """Return the pairs whose key is a text, the last of equal ones."""
        return {key: value for key, value in self.pairs or () if type(key) is str}


class Stub(Pairs):
    """What a call would have made: who was called, with what, and what was put into it."""

    __slots__ = ("args", "callee", "items", "state")

    def __init__(self, callee: Any, args: Any) -> None:
        super().__init__()
        self.callee, self.args = callee, args
        self.state: Any = None
        self.items: list[Any] | None = None

    def is_call_of(self, *names: str) -> bool:
        """Whether the callee has one of these names, as "module.name"."""
        callee = self.callee
        return type(callee) is Global and f"{callee.module}.{callee.name}" in names


class _Mark:
    """Where a run of arguments starts on the stack."""


_MARK = _Mark()

Bytes = bytes | mmap.mmap
Functions = Mapping[tuple[str, str], Callable[..., Any]]


class _Machine:
    def __init__(
        self, data: Bytes, start: int, functions: Functions, storage: Callable[[Any], Any] | None
    ) -> None:
        self.data, self.position = data, start
        self.functions, self.storage = functions, storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, limit: int) -> Any:
        for _ in range(limit):
            opcode = self.data[self.position]
            self.position += 1
            if opcode == 0x2E:  # STOP
                return self.pop()
            step = _STEPS.get(opcode)
            if step is None:
                raise PickleError(f"has the opcode {bytes([opcode])!r}, which is never data")
            step(self)
        raise PickleError(f"has more than {limit} opcodes")

    # Bytes of the program.

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise PickleError("ends too early")
        if count > MAX_TEXT_BYTES:
            raise PickleError(f"has a text of {count} bytes")
        return self.data[start : self.position]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise PickleError("ends too early")
        line, self.position = self.data[self.position : end], end + 1
        return line

    def integer(self, size: int) -> int:
        if size > MAX_INTEGER_BYTES:
            raise PickleError(f"has an integer of {size} bytes")
        return int.from_bytes(self.take(size), "little", signed=True)

    def text_number(self) -> str:
        line = self.line()
        if len(line) > MAX_INTEGER_BYTES:
            raise PickleError(f"has a number of {len(line)} digits")
        return line.decode("ascii")

    # The stack.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("takes a mark for a value")
        return value

    def top(self) -> Any:
        value = self.stack[-1]
        if value is _MARK:
            raise PickleError("takes a mark for a value")
        return value

    def since_mark(self) -> list[Any]:
        stack = self.stack
        for start in range(len(stack) - 1, -1, -1):
            if stack[start] is _MARK:
                values = stack[start + 1 :]
                del stack[start:]
                return values
        raise PickleError("misses a mark")

    def last(self, count: int) -> tuple[Any, ...]:
        values = tuple(self.stack[-count:])
        if len(values) < count or _MARK in values:
            raise PickleError("takes a mark for a value")
        del self.stack[-count:]
        return values

    # What opcodes do.

    def call(self, callee: Any, args: Any) -> Any:
        """One of our functions, or a stub."""
        function = self.functions.get(callee.key) if type(callee) is Global else None
        if function is None:
            return Stub(callee, args)
        if type(args) is not tuple:
            raise PickleError("calls a function with no tuple of arguments")
        return function(*args)

    def reduce(self) -> None:
        args = self.pop()
        self.push(self.call(self.pop(), args))

    def new(self) -> None:
        args = self.pop()
        self.push(Stub(self.pop(), args))

    def new_with_keywords(self) -> None:
        args = self.last(2)
        self.push(Stub(self.pop(), args))

    def instance(self) -> None:
        callee = Global(self.line().decode(), self.line().decode())
        self.push(Stub(callee, tuple(self.since_mark())))

    def object(self) -> None:
        callee, *args = self.since_mark()
        self.push(Stub(callee, tuple(args)))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if type(target) is Stub:
            target.state = state
        elif type(target) is not Pairs:  # an OrderedDict's attributes are no data
            raise PickleError("gives a state to a value that has none")

    def global_lines(self) -> None:
        self.push(Global(self.line().decode(), self.line().decode()))

    def global_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise PickleError("names a class by something that is no text")
        self.push(Global(module, name))

    def persistent(self) -> None:
        if self.storage is None:
            raise PickleError("refers to a storage where none can be")
        self.push(self.storage(self.pop()))

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is list:
            target.extend(values)
        elif type(target) is Stub:
            if target.items is None:
                target.items = []
            target.items.extend(values)
        else:
            raise PickleError("appends to a value that is no list")

    def set_pairs(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, Pairs) or len(values) % 2:
            raise PickleError("sets an entry of a value that is no dictionary")
        target.add(list(zip(values[::2], values[1::2], strict=True)))

    def dictionary(self) -> None:
        values = self.since_mark()
        self.push(Pairs())
        self.set_pairs(values)

    def frozen_set(self) -> None:
        stub = Stub(Global("builtins", "frozenset"), ())
        stub.items = self.since_mark()
        self.push(stub)

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        self.push(self.memo[index])

    def discard(self) -> None:
        self.stack.pop()


def _text(machine: _Machine, size: int) -> None:
    machine.push(machine.take(size).decode("utf-8", "surrogatepass"))


def _text_integer(machine: _Machine) -> None:
    text = machine.text_number()
    machine.push({"00": False, "01": True}[text] if text in ("00", "01") else int(text))


def _quoted(machine: _Machine) -> None:
    line = machine.line()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise PickleError("has a text without quotes")
    machine.push(codecs.escape_decode(line[1:-1])[0].decode("latin-1"))


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(value)


# Old texts (STRING) may be bytes; torch's own are ASCII.
_STEPS: dict[int, Callable[[_Machine], Any]] = {
    ord(opcode): step
    for opcode, step in {
        "\x80": lambda m: m.take(1),  # PROTO
        "\x95": lambda m: m.take(8),  # FRAME
        "N": _constant(None),
        "\x88": _constant(True),
        "\x89": _constant(False),
        ")": _constant(()),
        "(": _constant(_MARK),
        "]": lambda m: m.push([]),
        "}": lambda m: m.push(Pairs()),
        "\x8f": lambda m: m.push(Stub(Global("builtins", "set"), ())),
        "\x91": _Machine.frozen_set,
        "I": _text_integer,
        "L": lambda m: m.push(int(m.text_number().removesuffix("L"))),
        "F": lambda m: m.push(float(m.text_number())),
        "J": lambda m: m.push(m.number("<i")),
        "K": lambda m: m.push(m.number("<B")),
        "M": lambda m: m.push(m.number("<H")),
        "G": lambda m: m.push(m.number(">d")),
        "\x8a": lambda m: m.push(m.integer(m.number("<B"))),
        "\x8b": lambda m: m.push(m.integer(m.number("<I"))),
        "S": _quoted,
        "T": lambda m: m.push(m.take(m.number("<I")).decode("latin-1")),
        "U": lambda m: m.push(m.take(m.number("<B")).decode("latin-1")),
        "V": lambda m: m.push(m.line().decode("raw-unicode-escape")),
        "X": lambda m: _text(m, m.number("<I")),
        "\x8c": lambda m: _text(m, m.number("<B")),
        "\x8d": lambda m: _text(m, m.number("<Q")),
        "B": lambda m: m.push(m.take(m.number("<I"))),
        "C": lambda m: m.push(m.take(m.number("<B"))),
        "\x8e": lambda m: m.push(m.take(m.number("<Q"))),
        "\x96": lambda m: m.push(m.take(m.number("<Q"))),
        "0": _Machine.discard,
        "1": _Machine.since_mark,
        "2": lambda m: m.push(m.top()),
        "t": lambda m: m.push(tuple(m.since_mark())),
        "\x85": lambda m: m.push(m.last(1)),
        "\x86": lambda m: m.push(m.last(2)),
        "\x87": lambda m: m.push(m.last(3)),
        "l": lambda m: m.push(m.since_mark()),
        "d": _Machine.dictionary,
        "a": lambda m: m.extend([m.pop()]),
        "e": lambda m: m.extend(m.since_mark()),
        "\x90": lambda m: m.extend(m.since_mark()),
        "s": lambda m: m.set_pairs(list(m.last(2))),
        "u": lambda m: m.set_pairs(m.since_mark()),
        "c": _Machine.global_lines,
        "\x93": _Machine.global_stack,
        "R": _Machine.reduce,
        "\x81": _Machine.new,
        "\x92": _Machine.new_with_keywords,
        "i": _Machine.instance,
        "o": _Machine.object,
        "b": _Machine.build,
        "Q": _Machine.persistent,
        "p": lambda m: m.remember(int(m.text_number())),
        "q": lambda m: m.remember(m.number("<B")),
        "r": lambda m: m.remember(m.number("<I")),
        "\x94": lambda m: m.remember(len(m.memo)),
        "g": lambda m: m.recall(int(m.text_number())),
        "h": lambda m: m.recall(m.number("<B")),
        "j": lambda m: m.recall(m.number("<I")),
    }.items()
}


def run_program(
    data: Bytes,
    start: int = 0,
    functions: Functions | None = None,
    storage: Callable[[Any], Any] | None = None,
    limit: int = MAX_OPCODES,
) -> tuple[Any, int]:
    """Run a pickle program.

    Args:
        data: the bytes that hold it.
        start: its first byte.
        functions: (module, name) -> the function of ours that a call of this name stands for.
        storage: what a persistent id stands for; None refuses every one.
        limit: the most opcodes.

    Returns:
        What the program makes, of plain values, `Global`, `Pairs`, `Stub` and what `functions`
        and `storage` give; and the byte after the program.

    Raises:
        PickleError: The program is broken or exceeds a limit.
    """
    machine = _Machine(data, start, functions or {}, storage)
    # Millions of containers that are all kept would be searched for garbage again and again.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return machine.run(limit), machine.position
    except PickleError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # An empty stack, an unknown memo, wrong arguments, texts that are no UTF-8.
        raise PickleError(f"is broken at byte {machine.position}") from error
    finally:
        if collecting:
            gc.enable()
