"""The Fisher that costs nothing: the second moments that an optimiser leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.errors import InputError
from fisherkern.fingerprint import fingerprint

# Of the optimisers of PyTorch: the state's name, and how its decay is read off a group.
_MOMENTS = {
    "exp_avg_sq": lambda group: group["betas"][1],
    "square_avg": lambda group: group["alpha"],
}


Moment = tuple[Tensor, float, float]  # v, β and t of a parameter


def moments_of(optimizer: torch.optim.Optimizer, model: Any) -> dict[str, Moment]:
    """Return the second moment, its decay and the steps of every trainable parameter."""
    module = ModelAdapter.of(model).module
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    moments: dict[str, Moment] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        own, kind = optimizer.state.get(parameter, {}), type(optimizer).__name__
        key = next((key for key in _MOMENTS if key in own), None)
        if key is None or id(parameter) not in groups:
            raise InputError(
                f"optimizer: the {kind} has no second moment of {name!r}; it takes Adam, AdamW, "
                "NAdam, RAdam or RMSprop after a step that moved every trainable parameter"
            )
        decay = float(_MOMENTS[key](groups[id(parameter)]))
        moments[name] = own[key], decay, float(own["step"])
    return moments


def fisher_of_moments(
    moments: Mapping[str, Moment], optimizer: str, model: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return v / (1 − β^t) by parameter, and the `meta` of a Fisher made of it."""
    if not moments:
        raise InputError("model: it has no trainable parameter")
    found = {}
    for name, (moment, decay, step) in moments.items():
        wide = moment.detach().to(torch.promote_types(moment.dtype, torch.float32))
        found[name] = wide / (1 - decay**step)
        if not bool(torch.isfinite(found[name]).all() & (found[name] >= 0).all()):
            raise InputError(f"optimizer: the second moment of {name!r} is negative or not finite")
    meta = {
        "sampler": "optimizer",
        "reduction": "optimizer",
        "optimizer": optimizer,
        "steps": int(max(step for _, _, step in moments.values())),
        "num_sequences": None,
        "fingerprint": fingerprint(ModelAdapter.of(model).module),
    }
    return found, meta
