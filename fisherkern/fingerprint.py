"""What tells one trained model from another: a hash of its parameters."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """sha256 (64 hex digits) over the model's parameters.

    Over `named_parameters()` sorted by name (a parameter registered under two names counts
    once, under the first): name, dtype, shape and the raw bytes in row-major order. Buffers,
    the class and `requires_grad` do not enter, the device does not either. A single changed
    bit changes the result. Copies one parameter at a time to the CPU.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        header = [name, str(parameter.dtype), list(parameter.shape)]
        digest.update(json.dumps(header).encode())
        # Bytes rather than numbers: numpy has no bfloat16.
        raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()
