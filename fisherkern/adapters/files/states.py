"""Where the tensors of a checkpoint stand among everything that was saved with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fisherkern.adapters.files.mapped import Slot
from fisherkern.adapters.files.pickles import Pairs, Stub
from fisherkern.adapters.files.torch_files import Refused
from fisherkern.adapters.names import fit_names
from fisherkern.errors import InputError, shown

# Where trainers keep the weights; whatever other tensors there are is theirs.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network")
# A whole model nests modules tens deep and has some thousands.
MAX_MODULES = 1 << 16
_DEEPEST = 8
PLAIN = (int, float, str, bool, type(None))

TensorSlots = dict[str, Slot]


@dataclass(frozen=True)
class SavedState:
    """What torch.save wrote: its kind, the tensors by name, and the entries beside them.

    buffers: names of tensors that are no parameters, where the file says so.
    """

    kind: str
    slots: TensorSlots
    extras: dict[str, Any]
    buffers: frozenset[str] = frozenset()


def find_state(path: object, value: Any) -> SavedState:
    """Find the tensors of a model in what torch.save wrote.

    Raises InputError where there are no tensors, or several places that may be meant.
    """
    if _is_module(value):
        entries, buffers = _module_entries(path, value)
        return SavedState("module", _checked(path, entries), {}, buffers)
    if not isinstance(value, Pairs) or (isinstance(value, Stub) and not value.pairs):
        raise InputError(
            f"{path}: holds no tensors by name, but {_described(value)}; save a state_dict()"
        )
    entries = value.texts()
    holders = [key for key, entry in entries.items() if _holds_tensors(entry)]
    known = [key for key in _STATE_KEYS if key in holders]
    if not known and any(isinstance(entry, Slot | Refused) for entry in entries.values()):
        _named_by_text(path, value)
        return SavedState("state dict", _checked(path, entries), {})
    candidates = known or holders
    if not candidates:
        raise InputError(f"{path}: holds no tensors by name")
    if len(candidates) > 1:
        names = ", ".join(shown(name) for name in candidates[:5])
        raise InputError(f"{path}: holds tensors by name in several places: {names}")
    key = candidates[0]
    held = entries.pop(key)
    if _is_module(held):
        inner, buffers = _module_entries(path, held)
        return SavedState("module", _checked(path, inner), entries, buffers)
    _named_by_text(path, held)
    kind = "nested state dict"
    if "pytorch-lightning_version" in entries:
        kind = "lightning"
    elif key == "state_dict" and "config" in entries and "other_parameter" in entries:
        kind = "recbole"
    return SavedState(kind, _checked(path, held.texts()), entries)


def weights_beside(names: Collection[str], extras: Mapping[str, Any]) -> list[str]:
    """Find other tensors under the weights' names in what stands beside them.

    Such are running averages: their keys, `a.b` for what is inside `a`.
    """
    flat = {name.replace(".", "") for name in names}
    found: list[str] = []
    seen: set[int] = set()  # a pickle may hold one thing in many places, itself among them
    waiting = [(0, key, value) for key, value in extras.items()]
    while waiting:
        depth, key, value = waiting.pop()
        if id(value) in seen or depth > _DEEPEST:
            continue
        seen.add(id(value))
        if _is_module(value):
            found.append(key)
        elif isinstance(value, Pairs):
            entries = value.texts()
            own = [name for name, entry in entries.items() if isinstance(entry, Slot)]
            # Averages in buffers have no points in their names.
            if own and (fit_names(own, names) or flat.intersection(own)):
                found.append(key)
            else:
                inner = entries.items()
                waiting += [(depth + 1, f"{key}.{name}", entry) for name, entry in inner]
    return sorted(found)


def _described(value: Any) -> str:
    if isinstance(value, Stub):
        return f"an object of the class {shown(getattr(value.callee, 'name', None))}"
    return "one tensor" if isinstance(value, Slot | Refused) else f"a {type(value).__name__}"


def _named_by_text(path: object, value: Pairs) -> None:
    if any(type(key) is not str for key, _ in value.pairs or ()):
        raise InputError(f"{path}: holds tensors whose names are no texts")


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a dictionary with a tensor in it, or a module."""
    if _is_module(value):
        return True
    pairs = value.pairs or () if isinstance(value, Pairs) else ()
    return any(isinstance(entry, Slot | Refused) for _, entry in pairs)


def _checked(path: object, entries: dict[str, Any]) -> TensorSlots:
    """Return the tensors among entries; whatever else a model would need is refused by name."""
    tensors: TensorSlots = {}
    for name, entry in entries.items():
        if isinstance(entry, Slot):
            tensors[name] = entry
        elif isinstance(entry, Refused):
            raise InputError(f"{path}: tensor {shown(name)} is {entry.kind}, which is not read")
        # Counters and the like; get_extra_state is whatever a module likes.
        elif type(entry) not in PLAIN and not name.endswith("_extra_state"):
            raise InputError(f"{path}: {shown(name)} stands among the tensors and is none")
    if not tensors:
        raise InputError(f"{path}: holds no tensors by name")
    return tensors


def _is_module(value: Any) -> bool:
    """Whether this was an nn.Module, saved whole."""
    if not isinstance(value, Stub) or not isinstance(value.state, Pairs):
        return False
    return {"_parameters", "_buffers", "_modules"} <= value.state.texts().keys()


def _module_entries(path: object, module: Stub) -> tuple[dict[str, Any], frozenset[str]]:
    """Return what module.state_dict() would have given, and the names of its buffers."""
    entries: dict[str, Any] = {}
    held: set[str] = set()
    waiting, visited = [("", module)], 0
    while waiting:
        prefix, current = waiting.pop()
        visited += 1
        if visited > MAX_MODULES or len(prefix) > 10_000:
            raise InputError(f"{path}: holds modules without end")
        state = current.state.texts()
        names = _texts_of_set(state.get("_non_persistent_buffers_set"))
        buffers = {k: v for k, v in _texts(state["_buffers"]).items() if k not in names}
        for name, entry in (_texts(state["_parameters"]) | buffers).items():
            if entry is not None:
                entries[prefix + name] = entry
                held |= {prefix + name} if name in buffers else set()
        for name, child in reversed(_texts(state["_modules"]).items()):
            if _is_module(child):
                waiting.append((f"{prefix}{name}.", child))
            elif child is not None:
                raise InputError(f"{path}: {shown(prefix + name)} is a module of an unknown form")
    return entries, frozenset(held)


def _texts(value: Any) -> dict[str, Any]:
    return value.texts() if isinstance(value, Pairs) else {}


def _texts_of_set(value: Any) -> set[str]:
    """Return the texts of a set, which the old protocols make by a call and the new by opcodes."""
    if not isinstance(value, Stub):
        return set()
    called = value.args[0] if type(value.args) is tuple and value.args else []
    entries = [*(value.items or []), *(called if type(called) is list else [])]
    return {entry for entry in entries if type(entry) is str}
