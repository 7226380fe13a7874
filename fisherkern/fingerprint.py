"""Hashes that identify a trained model by its parameters, and a catalogue by its item ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """sha256 (64 hex digits) over the model's parameters.

    Over `named_parameters()` sorted by name (a parameter registered under two names counts
    once, under the first): name, dtype, shape and the raw bytes in row-major order. Buffers
    (`buffer_hashes` has those), the class and `requires_grad` do not enter, the device does not
    either. A single changed bit changes the result. Copies one parameter at a time to the CPU.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        _update(digest, name, parameter)
    return digest.hexdigest()


def buffer_hashes(model: nn.Module) -> dict[str, str]:
    """Return the sha256 of every floating buffer that is saved, by name, as `fingerprint` has it.

    Running statistics and frozen tables change what a model computes, and are no parameters.
    """
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            kept = buffer is not None and name not in module._non_persistent_buffers_set
            if kept and buffer.is_floating_point() and buffer.layout is torch.strided:
                whole = f"{prefix}.{name}".strip(".")
                _update(digest := hashlib.sha256(), whole, buffer)
                found[whole] = digest.hexdigest()
    return found


def _update(digest: Any, name: str, tensor: torch.Tensor) -> None:
    header = [name, str(tensor.dtype), list(tensor.shape)]
    digest.update(json.dumps(header).encode())
    if not tensor.numel():  # it may have strides that no view of bytes has
        return
    # Bytes rather than numbers: numpy has no bfloat16.
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(raw.numpy().data)


# Item ids made into JSON at once.
_IDS_AT_ONCE = 1 << 16


class ItemIdsHash:
    """The sha256 of item ids as the JSON of one list, made a piece at a time: they may be many.

    Args:
        digest: What came before the list, if anything; a sha256.
    """

    def __init__(self, digest: Any = None) -> None:
        self._digest = hashlib.sha256() if digest is None else digest
        self._digest.update(b"[")
        self._begun = False

    def update(self, ids: Sequence[Any]) -> None:
        """Add the next ids."""
        for start in range(0, len(ids), _IDS_AT_ONCE):
            part = json.dumps(ids[start : start + _IDS_AT_ONCE])[1:-1]
            self._digest.update(f"{', ' if self._begun else ''}{part}".encode())
            self._begun = True

    def hexdigest(self) -> str:
        """Return 64 hex digits, of all that came."""
        whole = self._digest.copy()
        whole.update(b"]")
        return whole.hexdigest()


def item_ids_sha256(item_ids: Any) -> str | None:
    """Return the sha256 (64 hex digits) of the item ids as JSON; None where there are none."""
    if item_ids is None:
        return None
    if not isinstance(item_ids, list):
        return hashlib.sha256(json.dumps(item_ids).encode()).hexdigest()
    digest = ItemIdsHash()
    digest.update(item_ids)
    return digest.hexdigest()


def json_sha256(value: Any) -> str | None:
    """Return the sha256 (64 hex digits) of a JSON value, its keys sorted; None for None."""
    if value is None:
        return None
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
