"""Symmetries at work: an encoder's own ones, and models transformed by them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.encoders.symmetry import AxisLabels, AxisSpec, Symmetries
from fisherkern.errors import InputError

# What a label's axis is multiplied by: int64 (n,), new[i] = old[index[i]], or an orthogonal
# float64 (n, n). A label that is missing stays as it is.
Transforms = Mapping[str, Tensor]


def symmetries_of(model: Any) -> Symmetries:
    """Return `model.symmetries()`, checked against the model's parameters.

    Raises:
        InputError: The model has no such method, or what it returns does not fit.
    """
    if not hasattr(model, "symmetries"):
        raise InputError(
            f"no symmetries are known for {type(model).__name__}; give it a method symmetries() "
            "to align it"
        )
    _check_inherited(type(model))
    symmetries: Symmetries = model.symmetries()
    symmetries.check(model)
    return symmetries


def _check_inherited(kind: type) -> None:
    """Raise InputError for a class that computes in its own way and inherits `symmetries`."""
    for parent in kind.__mro__:
        if "symmetries" in vars(parent):
            return
        own = {"states", "encode", "forward"} & vars(parent).keys()
        if own and hasattr(parent, "symmetries"):
            raise InputError(
                f"{parent.__name__} defines {min(own)}() but no symmetries(); define it too, as "
                "those of its parent class may not hold"
            )


def apply_transforms(part: Tensor, labels: AxisLabels, transforms: Transforms) -> Tensor:
    """Return `part` with every labelled dimension transformed."""
    for dim, label in enumerate(labels):
        transform = transforms.get(label) if label is not None else None
        if transform is None:
            continue
        if transform.dim() == 1:
            part = part.index_select(dim, transform.to(part.device))
        else:
            matrix = transform.to(part.device, part.dtype)
            part = torch.tensordot(matrix, part, dims=([1], [dim])).movedim(0, dim)
    return part


def transform_tensor(tensor: Tensor, axes: Sequence[AxisSpec], transforms: Transforms) -> Tensor:
    """Return a copy of `tensor`, which consists of `axes`, with its labelled axes transformed."""
    new = tensor.clone()
    for spec in axes:
        if any(label in transforms for label in spec.labels if label):
            part = apply_transforms(spec.part_of(tensor), spec.labels, transforms)
            spec.write(new, part)
    return new


def transform_model(model: nn.Module, symmetries: Symmetries, transforms: Transforms) -> Any:
    """Return a new model with the same function, whose labelled axes are transformed.

    The arithmetic is float64; permutations move values without changing a bit.
    """
    new = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            axes = symmetries.axes[name]
            parameter.copy_(transform_tensor(parameter.double(), axes, transforms))
    return new


def fold_norms(model: nn.Module, symmetries: Symmetries) -> Any:
    """Return a new model with the same function whose foldable layer norms have gain 1.

    W (g * n + b) + c = (W diag(g)) n + (W b + c), with n the normalised input of the norm; where
    there is no c, W (g * n + b) = (W diag(g)) (n + b / g).
    """
    new = copy.deepcopy(model)
    parameters = dict(new.named_parameters())
    with torch.no_grad():
        for norm_name, readers in symmetries.folds.items():
            norm: Any = new.get_submodule(norm_name)
            gain, shift = norm.weight.double().clone(), norm.bias.double().clone()
            movable = all(bias is not None for _, bias in readers)
            for weight_name, bias_name in readers:
                weight = parameters[weight_name].double()
                if movable and bias_name is not None:
                    bias = parameters[bias_name]
                    bias.copy_(bias.double() + weight @ shift)
                parameters[weight_name].copy_(weight * gain)
            norm.weight.fill_(1)
            norm.bias.copy_(torch.zeros_like(shift) if movable else shift / gain)
    return new
