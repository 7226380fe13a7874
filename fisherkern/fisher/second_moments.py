"""The Fisher that costs nothing: the second moments that an optimiser leaves behind."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.errors import InputError
from fisherkern.fingerprint import fingerprint

log = logging.getLogger("fisherkern")

Moment = tuple[Tensor, float, float]  # v, β and t of a parameter


def moments_of(optimizer: torch.optim.Optimizer, model: Any) -> dict[str, Moment]:
    """Return the second moment, its decay and the steps of every trainable parameter."""
    module, kind = ModelAdapter.of(model).module, type(optimizer).__name__
    if not hasattr(optimizer, "param_groups") or not isinstance(optimizer.state, Mapping):
        raise InputError(f"optimizer: a {kind} is no optimiser of PyTorch")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    moments: dict[str, Moment] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        own, group = optimizer.state.get(parameter, {}), groups.get(id(parameter), {})
        found = _moment(own, group)
        if found is None or found[0].shape != parameter.shape or "step" not in own:
            raise InputError(
                f"optimizer: the {kind} has no second moment of {name!r}; it takes Adam, AdamW, "
                "NAdam, RAdam or RMSprop after a step that moved every trainable parameter"
            )
        moments[name] = *found, float(own["step"])
    if any(_decays_by_gradient(group, kind) for group in optimizer.param_groups):
        log.warning(
            "optimizer: the %s adds its weight decay to the gradients, so the squares are not those"
            " of the loss alone; AdamW's are",
            kind,
        )
    return moments


def _moment(state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Tensor, float] | None:
    """v of a parameter and its β, as the optimisers of PyTorch have them; None for any other."""
    betas = group.get("betas", ())
    if "exp_avg_sq" in state and len(betas) == 2:
        moment, decay = state["exp_avg_sq"], betas[1]
    elif "square_avg" in state and "alpha" in group:
        moment, decay = state["square_avg"], group["alpha"]
    else:
        return None
    # Of 8 bits it is a code.
    known = isinstance(moment, Tensor) and moment.is_floating_point()
    return (moment, float(decay)) if known else None


def _decays_by_gradient(group: Mapping[str, Any], kind: str) -> bool:
    decoupled = group.get("decoupled_weight_decay", kind.endswith("AdamW"))
    return bool(group.get("weight_decay")) and not decoupled


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
